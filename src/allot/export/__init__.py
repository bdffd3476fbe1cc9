"""Files, runtimes, certificates and times: what becomes of a sparse model outside of Python."""
