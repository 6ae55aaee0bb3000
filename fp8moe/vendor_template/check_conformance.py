"""The verdict on ACME_MOE: level smoke, on the GPU that is here, else on the CPU."""

from conformance import check_backend


def test_conformance() -> None:
    report = check_backend("ACME_MOE", level="smoke")
    told = [f"{failure.check} {failure.case}: {failure.reason}\n{failure.reproduce}" for failure in report.failures]
    assert report.verdict == "passed", "\n".join([report.verdict, *told])
