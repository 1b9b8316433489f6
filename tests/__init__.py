"""OpenMP threads that wait must sleep: tests run side by side (see setup.cfg), and threads that spin would starve them.

Set here, because this is imported before torch is, which reads it then; processes that tests start inherit it.
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
