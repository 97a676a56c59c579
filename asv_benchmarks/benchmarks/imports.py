"""What an import costs, and a first call."""

import subprocess
import sys
import time


class Import:
    """Seconds until a fresh interpreter has imported a module; and a first call loads the core."""

    unit = "s"
    timeout = 120

    def _seconds(self, code, rounds):
        seconds = []
        for _ in range(rounds):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            seconds.append(time.perf_counter() - begin)
        return min(seconds)

    def track_import_over_numpy(self):
        ours = self._seconds("import batchnorm", 9) - self._seconds("pass", 9)
        return ours / (self._seconds("import numpy", 9) - self._seconds("pass", 9))

    track_import_over_numpy.unit = "times numpy's"

    def track_first_call(self):
        code = "import numpy as np, batchnorm as bn; x = np.ones((64, 100), np.float32)"
        return self._seconds(f"{code}; bn.batch_norm(x)", 3) - self._seconds(code, 3)
