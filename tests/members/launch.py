"""Start the members of a group, and end them when their time is over."""

import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
# What an MPI launcher runs as a member. One that is killed dies inside a shell, whose end the launcher
# would answer by killing the others: so the shell waits, for a minute, until they have written their
# files.
SHELL = """
folder=$1 size=$2
shift 2
"$@" && exit
echo "exit status $?"
[ -d "$folder" ] || exit 0
for _ in $(seq 600); do
    [ "$(ls "$folder" | grep -c 'pickle$')" -ge $((size - 1)) ] && exit
    sleep 0.1
done
"""
MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.defpath]))


def launch(engine, size, program, *arguments, limit=120):
    """Run a module as every member of a group; what they printed, and exit statuses."""
    # The same backend with and without the compiled core, on one thread: the others have the processors.
    settings = {"BATCHNORM_KERNELS": "numpy", "BATCHNORM_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **settings}
    command = [sys.executable, "-W", "error", "-m", program, *map(str, arguments)]
    if engine == "mpi":
        folders = [a for a in arguments if isinstance(a, Path)]
        shell = ["sh", "-c", SHELL, "sh", *map(str, [*folders, os.devnull][:1]), str(size)]
        commands = [[MPIEXEC, "-n", str(size), *shell, *command]]
        ranks = [{}]
    else:
        commands = [command] * size
        ranks = [{"RANK": str(rank), "WORLD_SIZE": str(size)} for rank in range(size)]
    log: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": TESTS}
    members = [
        subprocess.Popen(c, env={**environment, **own}, **log, start_new_session=True)
        for c, own in zip(commands, ranks, strict=True)
    ]
    end = time.monotonic() + limit
    try:
        said = [m.communicate(timeout=max(1, end - time.monotonic()))[0] for m in members]
    finally:
        for m in members:
            if m.poll() is None:
                m.kill()
                m.communicate()
    return "\n".join(said), [m.returncode for m in members]


def results(engine, size, program, *arguments, folder):
    """What every member found, by rank."""
    said, statuses = launch(engine, size, program, *arguments, folder)
    files = [folder / f"{rank}.pickle" for rank in range(size)]
    assert not any(statuses), said
    assert all(f.exists() for f in files), said
    return [pickle.loads(f.read_bytes()) for f in files]
