"""The C++ core's own tests, compiled with sanitizers, and faults that they have to see."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++")

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = ROOT / "src/native"
TESTS = ROOT / "tests/native"
CMAKE = (ROOT / "CMakeLists.txt").read_text()
SETS = re.findall(r"kernels_(\w+)\.cc PROPERTY", CMAKE)  # newer than the baseline, in their order

# Calls instead of inlined checks compile four times as fast.
ADDRESS = ["-O1", "-g1", "-fsanitize=address", "--param", "asan-instrumentation-with-call-threshold=0"]
KINDS = {
    "plain": ["-O1"],
    "address": ADDRESS,
    "undefined": [*ADDRESS, "-fsanitize=undefined", "-fno-sanitize-recover=all"],
    # All checks that do not double the time to compile.
    "undefined-kernels": [
        *ADDRESS,
        "-fsanitize=undefined",
        "-fno-sanitize=null,pointer-overflow,object-size",
        "-fsanitize-undefined-trap-on-error",
    ],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
    "address-test": ["-O2", "-DADDRESS_SANITIZER"],
}
LINKED = {"plain": [], "address": ["-fsanitize=address,undefined"], "thread": ["-fsanitize=thread"]}

# Instead of the kernels of an instruction set that a program leaves out.
STUB = 'namespace bn::{0} {{ extern const Kernels KERNELS; const Kernels KERNELS = {{"{0}"}}; }}\n'


def options(name):
    """Return the options that CMakeLists.txt has for the kernels of an instruction set."""
    (arithmetic,) = re.findall(r"set\(arithmetic ([^)]*)\)", CMAKE)
    own = re.findall(rf"kernels_{name}\.cc PROPERTY COMPILE_OPTIONS\s([^)]*)\)", CMAKE)
    return [*arithmetic.split(), *"".join(own).split()]


TABLE = "{nullptr, run_tile<Half>, run_tile<BFloat16>, run_tile<float>, run_tile<double>}"


def copy(folder, *changes):
    """Copy the core's sources, with (file, right text, wrong text) changed; return their folder."""
    copies = folder / "src/native"  # headers name others by their place
    shutil.copytree(SOURCES, copies)
    (folder / "src/batchnorm/backends").mkdir(parents=True)
    for header in ("activations.h", "coefficients.h"):
        shutil.copy(ROOT / "src/batchnorm/backends" / header, folder / "src/batchnorm/backends")
    for file, right, wrong in changes:
        text = (copies / file).read_text()
        assert text.count(right) == 1, "the text to change is there once"
        (copies / file).write_text(text.replace(right, wrong))
    return copies


def only(*types):
    """The change that compiles the kernels for some types of data: most of the time is theirs."""
    wanted = re.sub(r"run_tile<(\w+)>", lambda m: m[0] if m[1] in types else "nullptr", TABLE)
    return "kernels.inl", TABLE, wanted


class Build:
    """Objects and programs of the core's sources, each compiled once."""

    def __init__(self, folder, sources=SOURCES):
        self.folder, self.sources, self.made = folder, sources, {}

    def compile(self, source, kind, *more):
        if (source, kind) not in self.made:
            target = self.folder / f"{source.stem}-{kind}.o"
            flags = ["-std=c++20", "-pthread", "-Wno-psabi", f"-I{self.sources}", *KINDS[kind], *more]
            run(COMPILER, *flags, "-c", source, "-o", target)
            self.made[source, kind] = target
        return self.made[source, kind]

    def core(self, name, kind):
        return self.compile(self.sources / f"{name}.cc", kind)

    def kernels(self, name, kind):
        return self.compile(self.sources / f"kernels_{name}.cc", kind, *options(name))

    def stub(self, name, kind):
        source = self.folder / f"stub_{name}.cc"
        source.write_text('#include "job.h"\n' + STUB.format(name))
        return self.compile(source, kind)

    def program(self, kind, kernels, replaced=(), test="core"):
        """Link a program with `kernels`, by instruction set; `replaced` are other objects, by source."""
        own = {"address": "undefined"}.get(kind, kind)
        sources = ("core", "plan", "threads", *(["xla"] if test == "xla" else []))
        objects = {name: self.core(name, own) for name in sources} | dict(replaced)
        seen_by = {"address": "address-test"}.get(kind, kind) if test == "core" else kind
        objects["test"] = self.compile(TESTS / f"test_{test}.cc", seen_by)
        for name in ("baseline", *SETS):
            objects[name] = kernels.get(name) or self.stub(name, "plain")
        target = self.folder / f"program-{len(list(self.folder.glob('program-*')))}"
        run(COMPILER, *LINKED[kind], "-pthread", *objects.values(), "-ldl", "-o", target)
        return target


def run(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def outcome(program, *arguments):
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=0",  # the pool is never freed
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    return subprocess.run(
        [program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        timeout=600,
    )


def check(program, *arguments):
    done = outcome(program, *arguments)
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    return Build(tmp_path_factory.mktemp("core"))


@pytest.fixture(scope="module")
def sets(build):
    """List the instruction sets of this machine, from the oldest."""
    return run(build.program("thread", {})).split()


def test_the_thread_pool_has_no_races(build):
    check(build.program("thread", {}), "baseline", "pool")


@pytest.fixture(scope="module")
def kernels_with_threads(tmp_path_factory, sets):
    """The newest kernels for ThreadSanitizer: a type of 16 bits, and one that is exact."""
    folder = tmp_path_factory.mktemp("threads")
    kernels = Build(folder, copy(folder, only("Half", "float"))).kernels(sets[-1], "thread")
    return {sets[-1]: kernels}


@pytest.mark.slow
def test_memory_and_values(build, sets):
    """Under AddressSanitizer and UndefinedBehaviorSanitizer; test_kernels.py has the older sets."""
    name = sets[-1]
    check(build.program("address", {name: build.kernels(name, "undefined-kernels")}), name)


@pytest.mark.slow
def test_threads_have_no_races(build, sets, kernels_with_threads):
    """Under ThreadSanitizer, which threads after a fork are not for. What is shared, any set shares."""
    program = build.program("thread", kernels_with_threads)
    check(program, sets[-1], "tiles", "epilogues", "callers", "pool")


@pytest.mark.slow
def test_handlers_for_xla(build, sets, kernels_with_threads):
    """Under ThreadSanitizer, with pools that are late, stalled, absent, or the caller's own thread."""
    check(build.program("thread", kernels_with_threads, test="xla"), sets[-1])


XLA_FAULTS = {
    "nobody waits for tasks that run": (
        "state != CLOSED; ++i)",
        "false; ++i)",
        "ThreadSanitizer: ",
    ),
    "a task begins after the call": (
        "if (!(shared->state.fetch_add(RUNNING) & CLOSED))",
        "shared->state.fetch_add(RUNNING);",
        "",
    ),
    "the caller frees what late tasks look at": (
        "if (owners.fetch_sub(1) == 1) delete this;",
        "if (owners.fetch_sub(1) == owners.load() + 1) delete this;",
        "",
    ),
    "results lie where the statistics do": (
        "const Buffer& v = reader_.result();",
        "const Buffer& v = reader_.argument();",
        "",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", XLA_FAULTS)
def test_a_fault_in_the_handlers_is_caught(fault, build, sets, kernels_with_threads, tmp_path):
    right, wrong, said = XLA_FAULTS[fault]
    broken = Build(tmp_path, copy(tmp_path, ("xla.cc", right, wrong)))
    replaced = {"xla": broken.core("xla", "thread")}
    done = outcome(build.program("thread", kernels_with_threads, replaced, test="xla"), sets[-1])
    assert done.returncode != 0
    assert said in done.stdout, done.stdout[-3000:]


# Faults by name: the source, the right text, and a wrong one in its place; how the program is compiled,
# the cases that run, and what is said of it.
FAULTS = {
    "one value more is written": (
        "terms.inl",
        "at(t)), int(size - t));",
        "at(t)), int(size - t) + 1);",
        ("address", "small", "AddressSanitizer: "),
    ),
    "streaming stores begin anywhere": (
        "terms.inl",
        "return n < size ? n : size;",
        "return 0 * n;",
        ("plain", "streams", ""),
    ),
    "the last value of a span is left out": (
        "terms.inl",
        "        terms(0, t, int(size - t), k, term);",
        "        terms(0, t, int(size - t) - 1, k, term);",
        ("plain", "small", "FAILED small"),
    ),
    "a derivative is taken at h + y": (
        "terms.inl",
        "return from_y ? z : h + z;",
        "return h + z;",
        ("plain", "epilogues", "FAILED epilogue"),
    ),
    "rows that are left over are left out": (
        "plan.cc",
        "while (length % copies) --copies;",
        "",
        ("plain", "small", "FAILED small"),
    ),
    "nobody waits for running workers": (
        "threads.cc",
        "                if (!spin(ended)) state.wait(running);",
        "                break;",
        ("thread", "pool", "ThreadSanitizer: data race"),
    ),
    "workers see a task before its arguments": (
        "threads.cc",
        "slot.state.store(state + SUBMITTED);",
        "slot.state.store(state + SUBMITTED, std::memory_order_relaxed);",
        ("thread", "pool", "ThreadSanitizer: data race"),
    ),
    "threads share their scratch memory": (
        "core.cc",
        "scratch_ + me * scratch_bytes_",
        "scratch_",
        ("thread", "tiles", "ThreadSanitizer: data race"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault, build, sets, tmp_path, request):
    file, right, wrong, (kind, group, said) = FAULTS[fault]
    # AddressSanitizer knows which eight bytes may be written, and not which of these.
    seen_in = only("double" if kind == "address" else "float")
    broken = Build(tmp_path, copy(tmp_path, (file, right, wrong), seen_in))
    newest = sets[-1]
    if file.endswith(".inl"):
        program = build.program(kind, {newest: broken.kernels(newest, kind)})
    else:
        name = file.removesuffix(".cc")
        kernels = {}
        if kind == "thread" and group != "pool":
            kernels = request.getfixturevalue("kernels_with_threads")
        elif group != "pool":
            kernels = {newest: broken.kernels(newest, kind)}
        program = build.program(kind, kernels, {name: broken.core(name, kind)})
    done = outcome(program, newest, group)
    assert done.returncode != 0
    assert said in done.stdout, done.stdout[-3000:]
