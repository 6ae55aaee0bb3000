"""One file a backend: what it supports, as data, and the adapter that runs it."""
