"""Everything there is to learn from a GPU, in at most ten minutes and with nothing to download.

    make gpu                                build, test, sanitize, calibrate, bench
    make gpu STAGES=test=150,bench=60 ARGS="--jobs train"      chosen stages, with other limits in seconds

Each stage runs as a process of its own within its own time, so that one that fails or hangs takes nothing with it.
The outcome is one file, benchmarks/results/<gpu>/<date>-<commit>.json, completed by every stage that runs on the same
day and commit, and copied to $OUT when that is set. ``--rehearse`` runs the same plan in small on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "gpu"
TOTAL_SECONDS = 590.0
# Seconds, in order; they sum to the total.
STAGES = {"build": 150.0, "test": 120.0, "sanitize": 60.0, "calibrate": 45.0, "bench": 215.0}
STAGE = re.compile(rf"({'|'.join(STAGES)})(?:=([0-9]+))?(?=,|$)")
PROCESSES = max(2, (os.cpu_count() or 2) - 2)
KERNEL_TESTS = (
    "test_*_kernel.py",
    "test_cuda_kernels.py",
    "test_cuda_sm90.py",
    "test_joint_gradient.py",
    "test_memory.py",
)
# Of what no GPU has run yet. A kernel that hangs takes all multiprocessors, so each of these is by itself
NEW_TESTS = (
    "test_cuda_layernorm.py",
    "test_block_plan_gpu.py",
    "test_cuda_attention.py",
    "test_cuda_attention_bwd.py",
    "test_cuda_attention_kernel.py",
)
NEW_SHARE, NEW_SECONDS = 0.2, 25.0  # of the time that is left, but enough to start a process on every core
ALONE = {"OMP_NUM_THREADS": "1"}  # of as many processes as there are cores
LARGE_TESTS = "two_to_the_31"
OUTCOMES = ("PASSED", "FAILED", "SKIPPED", "ERROR")
SANITIZERS = ("memcheck", "racecheck")
FOUND = 9  # exit code of compute-sanitizer when it found something


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stages", default=",".join(STAGES), help="default: %(default)s")
    parser.add_argument("--jobs", default="", help="of the bench stage, these alone: infer,train")
    parser.add_argument("--rehearse", action="store_true", help="small sizes on the CPU; nothing under results/")
    args = parser.parse_args()
    wanted = {name: float(seconds or STAGES.get(name, 0)) for name, seconds in STAGE.findall(args.stages)}
    if unknown := [entry for entry in args.stages.split(",") if not STAGE.fullmatch(entry)]:
        parser.error(f"--stages has {unknown[0]!r}, expected some of {', '.join(STAGES)}, or one with =SECONDS")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    import gpu_jobs
    import torch

    jobs = [job.name for job in gpu_jobs.plan(args.rehearse)]
    if unknown := [name for name in args.jobs.split(",") if args.jobs and name not in jobs]:
        parser.error(f"--jobs has {unknown[0]!r}, expected some of {', '.join(jobs)}")

    if not args.rehearse and not torch.cuda.is_available():
        print("gpu: torch sees no CUDA device here; `--rehearse` runs the plan in small on the CPU", file=sys.stderr)
        return 3
    from fastvit.parity import machine

    facts = machine("cpu" if args.rehearse else "cuda")
    path = result_path(facts, args.rehearse)
    result = load(path) | {"machine": facts}
    start = time.monotonic()
    total = TOTAL_SECONDS if args.stages == ",".join(STAGES) else sum(wanted.values())
    for index, name in enumerate(wanted):
        limit = total - (time.monotonic() - start) - sum(list(wanted.values())[index + 1 :])
        print(f"\n== {name} (at most {limit:.0f} s)", flush=True)
        began = time.monotonic()
        outcome = run_stage(name, limit, args, result, path)
        result["stages"][name] = outcome | {"seconds": round(time.monotonic() - began, 1)}
        save(path, result)
    return report(result, wanted, path)


def result_path(facts: dict[str, Any], rehearse: bool) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    folder = WORK / "rehearsal" if rehearse else ROOT / "benchmarks" / "results" / slug
    return folder / f"{facts['date'][:10]}-{facts['commit'] or 'unknown'}.json"


def load(path: Path) -> dict[str, Any]:
    empty: dict[str, Any] = {"machine": {}, "stages": {}, "rows": [], "refused": []}
    return empty | (json.loads(path.read_text()) if path.exists() else {})


def save(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    copy_out(path)


def copy_out(path: Path) -> None:
    """The result and all logs, where $OUT says."""
    if not os.environ.get("OUT"):
        return
    out = Path(os.environ["OUT"])
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, out)
    with tarfile.open(out / "logs.tar.gz", "w:gz") as logs:
        for log in sorted(WORK.rglob("*.log")):
            logs.add(log, log.relative_to(WORK))


def run_stage(name: str, limit: float, args: argparse.Namespace, result: dict[str, Any], path: Path) -> dict[str, Any]:
    """Run one stage; what it found goes into ``result``, how it went is returned."""
    try:
        if name == "build":
            return build(limit)
        if name == "test":
            return test(limit, args.rehearse, result, path)
        if name == "sanitize":
            return sanitize(limit, args.rehearse)
        if name == "calibrate":
            return calibrate(limit, args.rehearse, result)
        return bench(limit, args, result, path)
    except Exception as error:  # the next stage may still tell something
        return {"ok": False, "error": f"{type(error).__name__}: {error}"}


def run(command: list[str], limit: float, log: str, **env: str) -> tuple[int | None, str]:
    """(exit code, end of the output) of a process; None when it had to be ended at its limit."""
    WORK.mkdir(parents=True, exist_ok=True)
    path = WORK / f"{log}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=os.environ | env, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout=max(limit, 1))
        except subprocess.TimeoutExpired:
            end(process)
            code = None
    return code, path.read_text(errors="replace")[-3000:]


def end(process: subprocess.Popen) -> None:
    """Ask first: pytest then tells what it found so far."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=8)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def build(limit: float) -> dict[str, Any]:
    """The compiled parts, in place, for this GPU only."""
    import torch

    env = {"MAX_JOBS": str(os.cpu_count()), "NVCC_THREADS": "2"}
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        env |= {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}" + "a" * (major >= 9), "FASTVIT_FORCE_CUDA": "1"}
    code, output = run([sys.executable, "setup.py", "build_ext", "--inplace"], limit - 15, "build", **env)
    probe = "from fastvit import _extension as e; print({'cpp': e.why_not_cpp(), 'cuda': e.why_not_cuda()})"
    _, loaded = run([sys.executable, "-c", probe], 15, "build-probe")
    print(loaded.strip())
    return {"ok": code == 0, "exit": code, "loaded": loaded.strip(), "output": "" if code == 0 else output}


def test(limit: float, rehearse: bool, result: dict[str, Any], path: Path) -> dict[str, Any]:
    """The parity certificate on the device, then the tests of the kernels, side by side on all cores."""
    start = time.monotonic()
    outcome = parity(limit * 0.6, rehearse, result)
    save(path, result)  # whatever becomes of the tests
    if rehearse:
        return outcome
    tests = run_pytest(limit - (time.monotonic() - start))
    return outcome | {"ok": outcome["ok"] and tests["exit"] == 0, "pytest": tests}


def parity(limit: float, rehearse: bool, result: dict[str, Any]) -> dict[str, Any]:
    from concurrent.futures import ThreadPoolExecutor

    import gpu_parity

    end = time.monotonic() + limit
    shutil.rmtree(WORK / "parity", ignore_errors=True)
    (WORK / "parity").mkdir(parents=True)

    def one(part: str) -> tuple[list[dict[str, Any]], str]:
        """(rows, what went wrong) of one part."""
        name, left = part.replace("/", "-"), end - time.monotonic()
        path = WORK / "parity" / f"{name}.json"
        command = [sys.executable, "benchmarks/gpu_parity.py", str(path), part, *["--rehearse"] * rehearse]
        limit = time_of_new(left) if part.startswith(gpu_parity.BY_NAME) else left
        code, output = run(command, limit, f"parity/{name}", **ALONE)
        rows = json.loads(path.read_text()) if path.exists() else []
        return rows, "" if code in (0, 1) and rows else "out of time" if code is None else output

    parts = gpu_parity.parts(rehearse)
    with ThreadPoolExecutor(PROCESSES) as pool:
        found = dict(zip(parts, pool.map(one, parts), strict=True))
    rows = result["parity"] = [row for part, _ in found.values() for row in part]
    missed = [row for row in rows if not row["passed"]]
    broken = {part: trouble for part, (_, trouble) in found.items() if trouble}
    print(f"parity: {len(rows) - len(missed)} passed, {len(missed)} failed, {len(broken)} of {len(parts)} parts broke")
    for row in missed[:30]:
        errors = " ".join(f"{row[key]:.2e}" for key in ("max_error", "max_limit", "rms_error", "rms_limit"))
        print(f"  {row.get('op') or row.get('model')} {row['shape']} {row['name']} {row['dtype']}: {errors}")
    for part, trouble in broken.items():
        print(f"  {part}: {trouble[-300:].strip()}")
    return {"ok": not missed and not broken, "broken": broken}


def run_pytest(limit: float) -> dict[str, Any]:
    """The tests that run kernels on the device; those that run them on the CPU have their place in `make test`."""
    command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "--tb=short"]
    side_by_side = ["-p", "xdist.plugin", "-n", str(PROCESSES)] if importlib.util.find_spec("xdist") else []
    end = time.monotonic() + limit
    new = _test_files(NEW_TESTS)
    files = [path for path in _test_files(KERNEL_TESTS) if path not in new]
    # those past 2^31 elements want most of the memory for themselves
    passes = {
        **{f"pytest-{Path(path).stem}": [path, "-k", "not cpu", *side_by_side] for path in new},
        "pytest-large": [*files, "-k", f"not cpu and {LARGE_TESTS}"],
        "pytest": [*files, "-k", f"not cpu and not {LARGE_TESTS}", *side_by_side],
    }
    codes, log = [], ""
    for name, choice in passes.items():
        left = end - time.monotonic()
        limit = time_of_new(left) if choice[0] in new else left
        codes.append(run([*command, *choice], limit, name, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", **ALONE)[0])
        log += (WORK / f"{name}.log").read_text(errors="replace")
    code = next((code for code in codes if code != 0), 0)
    line = r"(?m)^\[gw\d+\].* {0} (tests/.*)|^(tests/\S+::.*) {0}\b"
    found = {word: ["".join(name) for name in re.findall(line.format(word), log)] for word in OUTCOMES}
    counts = {word: len(names) for word, names in found.items()}
    failed = sorted(found["FAILED"] + found["ERROR"])
    state = "" if code is not None else ", out of time"
    print("pytest: " + ", ".join(f"{count} {word.lower()}" for word, count in counts.items()) + state, flush=True)
    return {"exit": code, "counts": counts, "failed": failed, "output": "" if code == 0 else log[-3000:]}


def time_of_new(left: float) -> float:
    """Seconds for what no GPU has run yet, of those that are left."""
    return min(left, max(NEW_SHARE * left, NEW_SECONDS))


def _test_files(globs: Collection[str]) -> list[str]:
    return [str(path.relative_to(ROOT)) for glob in globs for path in sorted((ROOT / "tests").glob(glob))]


def sanitize(limit: float, rehearse: bool) -> dict[str, Any]:
    """compute-sanitizer over every kernel at small sizes, its tools side by side; without it the kernels alone."""
    from concurrent.futures import ThreadPoolExecutor

    tool = find_sanitizer()
    if tool is None:
        print("sanitize: compute-sanitizer is neither on the PATH nor under CUDA_HOME: the kernels run unwatched")
    jobs = [(part, check) for part in ("cuda", "triton") for check in (SANITIZERS if tool else ("unwatched",))]

    def one(job: tuple[str, str]) -> dict[str, Any]:
        part, check = job
        watch = [tool, "--tool", check, "--error-exitcode", str(FOUND)] if tool else []
        command = [*watch, sys.executable, "benchmarks/gpu_sanitize.py", part, *["--rehearse"] * rehearse]
        # Without PyTorch's cache each tensor is an allocation of its own, and a step beyond it is seen
        code, output = run(command, limit, f"sanitize-{part}-{check}", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        last = (output.strip().splitlines() or [""])[-1]
        state = {None: "out of time", 0: "clean", FOUND: "FOUND ERRORS"}.get(code, f"exit {code}")
        print(f"{part} {check}: {state}: {last}", flush=True)
        return {"exit": code, "summary": last, "output": "" if code == 0 else output}

    with ThreadPoolExecutor(len(jobs)) as pool:
        found = {" ".join(job): outcome for job, outcome in zip(jobs, pool.map(one, jobs), strict=True)}
    return {"ok": all(outcome["exit"] == 0 for outcome in found.values()), "watched": tool is not None, "runs": found}


def find_sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def calibrate(limit: float, rehearse: bool, result: dict[str, Any]) -> dict[str, Any]:
    part = WORK / "calibration.json"
    part.unlink(missing_ok=True)
    command = [sys.executable, "benchmarks/gpu_calibrate.py", str(part), *["--rehearse"] * rehearse]
    code, output = run(command, limit, "calibrate")
    print(output.strip())
    if part.exists():
        result |= json.loads(part.read_text())
    return {"ok": code == 0, "exit": code, "output": "" if code == 0 else output}


def bench(limit: float, args: argparse.Namespace, result: dict[str, Any], path: Path) -> dict[str, Any]:
    """The jobs of benchmarks/gpu_jobs.py in order of worth, as many as fit; ``path`` is written after each."""
    import gpu_jobs

    end = time.monotonic() + limit
    jobs = [job for job in gpu_jobs.plan(args.rehearse) if not args.jobs or job.name in args.jobs.split(",")]
    wanted = {job.name for job in jobs}
    for key in ("rows", "refused"):  # a job that runs again replaces what it found before
        result[key] = [row for row in result[key] if row.get("job") not in wanted]
    outcomes = {}
    for job in jobs:
        left = end - time.monotonic()
        if left < 15:
            outcomes[job.name] = "no time left"
            continue
        part = WORK / f"{job.name}.json"
        part.unlink(missing_ok=True)
        call = json.dumps(job.arguments | {"ceilings": result.get("ceilings")})
        code, output = run(
            [sys.executable, "benchmarks/gpu_jobs.py", str(part), call],
            min(job.seconds, left),
            f"bench-{job.name}",
            TORCHINDUCTOR_CACHE_DIR=str(WORK / "inductor"),
        )
        found = json.loads(part.read_text()) if part.exists() else {"rows": [], "refused": [], "table": ""}
        for key in ("rows", "refused"):
            result[key] += [row | {"job": job.name} for row in found[key]]
        save(path, result)
        outcomes[job.name] = "ok" if code == 0 else "out of time" if code is None else f"exit {code}: {output[-800:]}"
        print(f"-- {job.name}: {outcomes[job.name]}\n{found['table']}", flush=True)
    return {"ok": all(state == "ok" for state in outcomes.values()), "jobs": outcomes}


def report(result: dict[str, Any], wanted: Collection[str], path: Path) -> int:
    print("\n== summary")
    failed = 0
    for name in wanted:
        outcome = result["stages"].get(name, {"ok": False, "seconds": 0.0})
        failed += not outcome["ok"]
        print(f"{name:<10} {'ok' if outcome['ok'] else 'FAILED'} {outcome['seconds']:8.1f} s")
    for row in result["refused"]:
        print(f"not timed: {row.get('op') or row['model']} {row['mode']} by {row['provider']}: {row['reason']}")
    print(f"written: {path.relative_to(ROOT)}")
    print(f"{len(wanted) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
