"""The pytest plug-in: options, markers, the header and the tables. Loads neither torch nor triton by itself."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from conformance.early_exit import EarlyExit

if TYPE_CHECKING:
    from concurrent.futures import Future

    from conformance.compiled.outcome import Outcome
    from conformance.selection.ahead import Ahead
    from conformance.session import Session

HERE = Path(__file__).parent
SESSION_KEY = pytest.StashKey["Session"]()
EARLY_EXIT_KEY = pytest.StashKey[EarlyExit]()
RESULTS_KEY = pytest.StashKey[list[str]]()
JUDGING_KEY: pytest.StashKey[Ahead] = pytest.StashKey()
OWN_GPU_KEY = pytest.StashKey[bool]()
"""Of a worker of pytest-xdist: whether its GPU is its alone."""
COMPILING_KEY: pytest.StashKey[Future[dict[tuple[str, str], Outcome]]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fp8moe", "conformance of FP8 MoE backends (pytest conformance)")
    group.addoption(
        "--fp8moe-device",
        default="auto",
        choices=("auto", "cpu", "interpreter", "cuda", "rocm", "xpu"),
        help="where backends run; auto: the GPU that torch sees, else the CPU with Triton's interpreter",
    )
    group.addoption(
        "--fp8moe-backend",
        action="append",
        default=[],
        metavar="NAME|MODULE:CLASS",
        help="judge only this backend; may be given again (default: all). A run that judged no case of it, because it "
        "cannot be had here, say, ends with status 1",
    )
    group.addoption(
        "--fp8moe-scheme",
        action="append",
        default=[],
        metavar="NAME",
        help="judge only this quantisation scheme; may be given again (default: all)",
    )
    group.addoption(
        "--fp8moe-examples", type=int, default=None, metavar="N", help="random cases for each backend and scheme"
    )
    group.addoption("--fp8moe-seed", type=int, default=0, metavar="N", help="seed of the random cases (default 0)")
    group.addoption(
        "--fp8moe-budget",
        type=float,
        default=None,
        metavar="SECONDS",
        help="start no further case of a backend after this time; what is left out is skipped and says so",
    )
    group.addoption(
        "--fp8moe-isolate",
        action="store_const",
        const="all",
        help="judge every backend in a worker process, within the limits of fp8moe check; else only those from outside "
        "the tree are. A backend's crash, exit, hang and the like are that case's own result there",
    )
    group.addoption(
        "--fp8moe-no-isolate",
        dest="fp8moe_isolate",
        action="store_const",
        const="none",
        help="judge every backend in pytest's own process, for a debugger; so do --pdb and --trace",
    )
    group.addoption(
        "--fp8moe-compile",
        default="subset",
        choices=("subset", "all", "none"),
        help="compile TRITON's kernels for a few targets, for all that the selector knows, or for none",
    )
    group.addoption(
        "--fp8moe-gate",
        default=None,
        metavar="FILE",
        help="compare decisions, numbers and speed with a baseline: of `fp8moe gate --write`, or of pytest-benchmark",
    )
    group.addoption(
        "--fp8moe-gate-write",
        action="store_true",
        help="gather a baseline into pytest-benchmark's storage; with --benchmark-save or --benchmark-autosave",
    )
    group.addoption(
        "--fp8moe-gate-unwatched",
        action="store_true",
        help="take a verdict on times though nothing tells the device's state: clocks, throttling, other processes",
    )
    group.addoption("--fp8moe-report", default=None, metavar="FILE", help="write every result as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "selects: checks of the selector")
    config.addinivalue_line("markers", "computes: checks of what a backend computes")
    config.addinivalue_line("markers", "compiles: our kernels compiled for devices that need not be here")
    config.addinivalue_line("markers", "performs: the time of the selected backend, on a GPU")
    config.addinivalue_line("markers", "gate: decisions, numbers and speed beside a baseline")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The gate's tests are there only where one of its options is."""
    asked = config.getoption("--fp8moe-gate") or config.getoption("--fp8moe-gate-write")
    return True if collection_path == HERE / "test_gate.py" and not asked else None


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    guard = session.config.stash.get(EARLY_EXIT_KEY, None)
    if guard is not None:
        guard.status = int(session.exitstatus)


def pytest_unconfigure(config: pytest.Config) -> None:
    found = config.stash.get(SESSION_KEY, None)
    if found is not None:
        found.isolation.close()
    guard = config.stash.get(EARLY_EXIT_KEY, None)
    if guard is not None:
        guard.end()


def session_of(config: pytest.Config) -> Session:
    """The run's plan and ledger; made at the first use, which imports torch."""
    found = config.stash.get(SESSION_KEY, None)
    if found is None:
        # Triton's interpreter multiplies tiles with numpy: its threads would wait for each other longer than they
        # work. Read when numpy is first imported, which is now.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        worker = getattr(config, "workerinput", None)
        if worker is not None:
            from conformance.gpus import take_one

            config.stash[OWN_GPU_KEY] = take_one(int(worker["workerid"].removeprefix("gw")), int(worker["workercount"]))
        from conformance.session import Session

        if EARLY_EXIT_KEY not in config.stash:
            config.stash[EARLY_EXIT_KEY] = EarlyExit(lambda: _release(config), lambda: _at_work(config))
        try:
            found = config.stash[SESSION_KEY] = Session.of(config)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error
    return found


def _release(config: pytest.Config) -> None:
    capture: Any = config.pluginmanager.get_plugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=True)


def _at_work(config: pytest.Config) -> str:
    found = config.stash.get(SESSION_KEY, None)
    test = os.environ.get("PYTEST_CURRENT_TEST", "no test")
    return f"{test}, {found.judging}" if found is not None and found.judging else test


def in_suite(item: pytest.Item) -> bool:
    return HERE in Path(item.path).parents


@pytest.fixture(scope="session")
def fp8moe_session(request: pytest.FixtureRequest) -> Session:
    """The run's target, plan and options."""
    return session_of(request.config)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    """Results travel in the report, so that they arrive from the workers of pytest-xdist as well."""
    outcome = yield
    report = outcome.get_result()
    if report.when == "call" and RESULTS_KEY in item.stash:
        report.fp8moe_results = item.stash[RESULTS_KEY]
    elif in_suite(item) and item.get_closest_marker("selects") and (report.when == "call" or report.failed):
        from conformance.results import of_test

        report.fp8moe_results = [of_test(item.name, report.outcome, report.longreprtext).to_json()]


class _Collector:
    """Registered only where the suite was collected: nothing of it runs in other people's test sessions."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = session_of(self.config)
        found.computes |= "computes" in report.keywords and "test_computes.py" in report.nodeid
        found.take(getattr(report, "fp8moe_results", ()))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A run that judged nothing of a backend that was asked for by name has not passed."""
        if session.exitstatus == pytest.ExitCode.OK and session_of(self.config).unjudged():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        session_of(self.config).write_summary(terminalreporter)


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """The header, once it is known that the suite is part of the run."""
    if not any(in_suite(item) for item in items):
        return []
    compiled = sum(compiles(item) for item in items)
    mode = config.getoption("--fp8moe-compile")
    also = [f"compiled for devices that need not be here: {compiled} (--fp8moe-compile={mode})"] if compiled else []
    return [*_begin(config), *also]


def compiles(item: pytest.Item) -> bool:
    return in_suite(item) and item.get_closest_marker("compiles") is not None


def pairs_in(items: list[pytest.Item]) -> list[tuple[str, str]]:
    """The (target, kernel) pairs that the tests among these compile."""
    specs = [getattr(item, "callspec", None) for item in items if compiles(item)]
    pairs = [spec.params.get("pair") for spec in specs if spec is not None]
    return [pair for pair in pairs if isinstance(pair, tuple)]


def judges_the_grid(item: pytest.Item) -> bool:
    return in_suite(item) and "report" in getattr(item, "fixturenames", ()) and bool(item.get_closest_marker("selects"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The selector's grid and what compiles go last: processes of their own work on them beside the other tests."""
    items.sort(key=lambda item: 2 * compiles(item) + judges_the_grid(item))


def pytest_runtestloop(session: pytest.Session) -> None:
    """Begins to judge the grid and to compile, beside the other tests; under pytest-xdist the one worker that runs
    these tests begins when it gets there."""
    pairs = pairs_in(session.items)
    distributed = hasattr(session.config, "workerinput") or bool(session.config.getoption("numprocesses", None))
    grid = sum(judges_the_grid(item) for item in session.items)
    beside = any(in_suite(item) and item.get_closest_marker("computes") for item in session.items)
    if grid and beside and not distributed and not session.config.option.collectonly:
        from conformance.selection.ahead import Ahead

        session.config.stash[JUDGING_KEY] = Ahead()
    if pairs and not distributed and not session.config.option.collectonly:
        from conformance.compiled.ahead import begin

        session.config.stash[COMPILING_KEY] = begin(pairs)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """With `-n auto` a run of this suite on GPUs has a worker for each of them."""
    if config.getoption("--fp8moe-device") in ("cpu", "interpreter") or not _asks_for_suite(config):
        return None
    from conformance.gpus import count

    return count() or None


def pytest_sessionstart(session: pytest.Session) -> None:
    """A wrong option is told once, before each module would tell it. Under pytest-xdist the controller collects nothing
    itself, so it goes by the arguments."""
    config = session.config
    if not config.pluginmanager.has_plugin("xdist"):
        config.addinivalue_line("markers", "xdist_group(name): tests for one worker of pytest-xdist, which is not here")
    if _asks_for_suite(config):
        session_of(config)
    controls_workers = bool(config.getoption("numprocesses", None)) and not hasattr(config, "workerinput")
    if controls_workers and _asks_for_suite(config):
        terminal = config.pluginmanager.get_plugin("terminalreporter")
        for line in _begin(config):
            if terminal is not None:
                terminal.write_line(line)


def _begin(config: pytest.Config) -> list[str]:
    if hasattr(config, "workerinput") or config.pluginmanager.has_plugin("fp8moe-collector"):
        return []
    config.pluginmanager.register(_Collector(config), "fp8moe-collector")
    return session_of(config).header()


def _asks_for_suite(config: pytest.Config) -> bool:
    return any(_is_suite(argument, config.option.pyargs) for argument in config.args)


def _is_suite(argument: str, pyargs: bool) -> bool:
    """The suite's folder, a file of it, the checkout around it, or its name as `--pyargs` takes it."""
    path = Path(argument.split("::")[0])
    return (
        (pyargs and str(path) == HERE.name) or path.resolve() in (HERE, HERE.parent) or HERE in path.resolve().parents
    )
