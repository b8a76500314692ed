"""`pytest benchmarks/` collects bench_*.py; the tests in tests/ keep their own names."""


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")
