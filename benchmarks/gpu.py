"""Everything there is to learn from a GPU, in at most ten minutes and with nothing to download.

    make gpu                                build, test, sanitize, calibrate, bench
    make gpu STAGES=bench ARGS="--jobs train"

Each stage runs as a process of its own within its own time, so that one that fails or hangs takes nothing with it.
The outcome is one file, benchmarks/results/<gpu>/<date>-<commit>.json, completed by every stage that runs on the same
day and commit, and copied to $OUT when that is set. ``--rehearse`` runs the same plan in small on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "gpu"
TOTAL_SECONDS = 590.0
# Seconds, in order; they sum to the total.
STAGES = {"build": 150.0, "test": 120.0, "sanitize": 60.0, "calibrate": 45.0, "bench": 215.0}
TEST_PROCESSES = 5
SANITIZERS = ("memcheck", "racecheck")
FOUND = 9  # exit code of compute-sanitizer when it found something


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stages", default=",".join(STAGES), help="default: %(default)s")
    parser.add_argument("--jobs", default="", help="of the bench stage, the jobs whose name contains this")
    parser.add_argument("--rehearse", action="store_true", help="small sizes on the CPU; nothing under results/")
    args = parser.parse_args()
    wanted = args.stages.split(",")
    unknown = [name for name in wanted if name not in STAGES]
    if unknown:
        parser.error(f"--stages has {unknown[0]!r}, expected some of {', '.join(STAGES)}")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    sys.path.insert(0, str(ROOT))
    import torch

    if not args.rehearse and not torch.cuda.is_available():
        print("gpu: torch sees no CUDA device here; `--rehearse` runs the plan in small on the CPU", file=sys.stderr)
        return 3
    from fastvit.parity import machine

    facts = machine("cpu" if args.rehearse else "cuda")
    path = result_path(facts, args.rehearse)
    result = load(path) | {"machine": facts}
    start = time.monotonic()
    for name in [stage for stage in STAGES if stage in wanted]:
        later = sum(STAGES[stage] for stage in wanted if list(STAGES).index(stage) > list(STAGES).index(name))
        limit = TOTAL_SECONDS - (time.monotonic() - start) - later
        print(f"\n== {name} (at most {limit:.0f} s)", flush=True)
        began = time.monotonic()
        outcome = run_stage(name, limit, args, result)
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
    if os.environ.get("OUT"):
        os.makedirs(os.environ["OUT"], exist_ok=True)
        shutil.copy(path, os.environ["OUT"])


def run_stage(name: str, limit: float, args: argparse.Namespace, result: dict[str, Any]) -> dict[str, Any]:
    """Run one stage; what it found goes into ``result``, how it went is returned."""
    try:
        if name == "build":
            return build(limit)
        if name == "test":
            return test(limit, args.rehearse, result)
        if name == "sanitize":
            return sanitize(limit, args.rehearse)
        if name == "calibrate":
            return calibrate(limit, args.rehearse, result)
        return bench(limit, args, result)
    except Exception as error:  # the next stage may still tell something
        return {"ok": False, "error": f"{type(error).__name__}: {error}"}


def run(command: list[str], limit: float, log: str, **env: str) -> tuple[int | None, str]:
    """(exit code, end of the output) of a process; None when it had to be ended at its limit."""
    WORK.mkdir(parents=True, exist_ok=True)
    path = WORK / f"{log}.log"
    with path.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=os.environ | env, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout=max(limit, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    copy_out(path)
    return code, path.read_text(errors="replace")[-3000:]


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


def test(limit: float, rehearse: bool, result: dict[str, Any]) -> dict[str, Any]:
    """The parity certificate on the device, then the test files that know about CUDA, several at a time."""
    start = time.monotonic()
    part = WORK / "parity.json"
    part.unlink(missing_ok=True)
    command = [sys.executable, "benchmarks/gpu_parity.py", str(part), *["--rehearse"] * rehearse]
    code, output = run(command, limit * 0.5, "parity")
    rows = json.loads(part.read_text())["rows"] if part.exists() else []
    result["parity"] = rows
    missed = [row for row in rows if not row["passed"]]
    print(f"parity: {len(rows) - len(missed)} passed, {len(missed)} failed" + ("" if code in (0, 1) else f"\n{output}"))
    outcome: dict[str, Any] = {"ok": code == 0, "parity_exit": code, "output": "" if code in (0, 1) else output}
    for row in missed[:20]:
        print(f"  {row.get('op') or row.get('model')} {row['name']} {row['dtype']}")
    if rehearse:
        return outcome
    counts = run_pytest(limit - (time.monotonic() - start))
    return outcome | {"ok": outcome["ok"] and all(count["exit"] == 0 for count in counts.values()), "pytest": counts}


def run_pytest(limit: float) -> dict[str, Any]:
    """Every test file that names CUDA, each in its own process."""
    from concurrent.futures import ThreadPoolExecutor

    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "cuda.is_available" in path.read_text()]
    end = time.monotonic() + limit

    def one(path: Path) -> dict[str, Any]:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-rf", f"tests/{path.name}"]
        code, output = run(command, end - time.monotonic(), path.stem, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
        last = output.strip().splitlines()[-1:] or [""]
        print(f"{path.name}: {last[0] if code is not None else 'out of time'}", flush=True)
        return {"exit": code, "summary": last[0], "output": "" if code == 0 else output}

    with ThreadPoolExecutor(TEST_PROCESSES) as pool:
        return {path.name: outcome for path, outcome in zip(files, pool.map(one, files), strict=True)}


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


def bench(limit: float, args: argparse.Namespace, result: dict[str, Any]) -> dict[str, Any]:
    """The jobs of benchmarks/gpu_jobs.py in order of worth, as many as the time allows."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu_jobs

    end = time.monotonic() + limit
    jobs = [job for job in gpu_jobs.plan(args.rehearse) if args.jobs in job.name]
    names = {job.name for job in jobs}
    for key in ("rows", "refused"):  # a job that runs again replaces what it found before
        result[key] = [row for row in result[key] if row.get("job") not in names]
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
        outcomes[job.name] = "ok" if code == 0 else "out of time" if code is None else f"exit {code}: {output[-800:]}"
        print(f"-- {job.name}: {outcomes[job.name]}\n{found['table']}", flush=True)
    return {"ok": all(state == "ok" for state in outcomes.values()), "jobs": outcomes}


def report(result: dict[str, Any], wanted: list[str], path: Path) -> int:
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
