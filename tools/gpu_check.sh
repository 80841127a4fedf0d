#!/usr/bin/env bash
# Builds fastreward on a machine with an NVIDIA GPU (nvcc, torch, triton, no network), tests the GPU backends, runs
# compute-sanitizer over a small sample where it is present, then the benches. Under ten minutes; every part has its own
# time limit and a part that fails does not stop the next. Ends with a table of at most 40 lines.
#
#   tools/gpu_check.sh            writes JSON and logs under ${OUT:-bench/results}
#   PYTHON=/path/to/python tools/gpu_check.sh
set -u

repo="$(cd "$(dirname "$0")/.." && pwd)"
out="${OUT:-$repo/bench/results}"
python="${PYTHON:-python3}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
: >"$work/parts"

# part NAME SECONDS COMMAND...: runs a part under a time limit, its output in $out/NAME.log, its outcome in the table.
part() {
  local name="$1" limit="$2" start status
  shift 2
  start=$(date +%s)
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  printf '%s\t%s\t%s\n' "$name" "$status" "$(($(date +%s) - start))" >>"$work/parts"
  if [ "$status" -ne 0 ]; then
    echo "--- $name: exit $status, end of its log:"
    tail -n 12 "$out/$name.log" | cut -c 1-200
  fi
  return "$status"
}

skip() { printf '%s\t%s\t0\n' "$1" "skipped: $2" >>"$work/parts"; }

"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "gpu_check: torch sees no CUDA device")' || exit 2
export PATH="$PATH:/usr/local/cuda/bin"
command -v nvcc >/dev/null || { echo "gpu_check: nvcc is not on PATH" >&2; exit 2; }
capability="$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')"

# ------------------------------------------------------------------------------------------------ build and install
part build 150 "$python" -m pip install --no-build-isolation --no-deps --no-index --quiet --target "$work/site" "$repo" \
  -C cmake.define.FASTREWARD_CUDA=ON -C "cmake.define.FASTREWARD_CUDA_ARCHS=$capability-real" -C "build-dir=$work/build"
built=$?

# The installed package is what is tested: away from the checkout, whose own folder of that name has no modules built.
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
cp -r "$repo/tests" "$work/tests"
cd "$work" || exit 2
pytest=("$python" -m pytest -c "$repo/pyproject.toml" --rootdir "$work" -p no:cacheprovider -q)
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 4)

if [ "$built" -eq 0 ]; then
  # ---------------------------------------------------------------------------------------------------------- tests
  part tests 200 "${pytest[@]}" -m gpu "${workers[@]}" --maxfail=40 --tb=line \
    --junitxml "$work/tests.xml" "$work/tests/test_gpu.py"

  if "$python" -c 'import cupy' 2>/dev/null; then # the same kernels, compiled by NVRTC
    FASTREWARD_CUDA_ROUTE=cupy part cupy 50 "${pytest[@]}" -m gpu -k "cuda and small" "$work/tests/test_gpu.py"
  else
    skip cupy "CuPy is not installed"
  fi

  # ------------------------------------------------------------------------------------------------------ sanitizer
  if command -v compute-sanitizer >/dev/null; then
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # every tensor its own allocation, so that its ends are guarded
    part sanitizer 60 compute-sanitizer --tool memcheck --error-exitcode 9 "${pytest[@]}" -m gpu \
      -k "cuda and (small_illegal or (small_logprobs and (strided or keep)) or (small_program and everything) or small_whiten)" \
      "$work/tests/test_gpu.py"
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
  else
    skip sanitizer "compute-sanitizer is not on PATH"
  fi

  # ---------------------------------------------------------------------------------------------------------- bench
  for backend in triton cuda; do
    FASTREWARD_BACKEND=$backend part "bench_$backend" 62 "$python" -m fastreward.cli bench \
      --device cuda --seconds 0.5 --no-memory --json "$work/bench_$backend.json"
  done
else
  for name in tests cupy sanitizer bench_triton bench_cuda; do skip "$name" "the build failed"; done
fi

# ---------------------------------------------------------------------------------------------------- JSON and table
"$python" - "$work" "$out" "$repo" <<'PYTHON'
import datetime
import json
import pathlib
import subprocess
import sys
import xml.etree.ElementTree as xml

import torch

work, out, repo = map(pathlib.Path, sys.argv[1:])


def commit() -> str:
    run = subprocess.run(["git", "-C", str(repo), "rev-parse", "HEAD"], capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def tests() -> dict[str, object] | None:
    path = work / "tests.xml"
    if not path.exists():
        return None
    cases = list(xml.parse(path).getroot().iter("testcase"))
    failed = [c.get("name") for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    counts: dict[str, dict[str, int]] = {}
    for c in cases:
        backend = next((b for b in ("triton", "cuda") if b in str(c.get("name"))), "other")
        state = "failed" if c.get("name") in failed else "skipped" if c.find("skipped") is not None else "passed"
        counts.setdefault(backend, {"passed": 0, "failed": 0, "skipped": 0})[state] += 1
    return {"passed": len(cases) - len(failed) - skipped, "skipped": skipped, "by_backend": counts, "failed": failed}


parts = [line.split("\t") for line in (work / "parts").read_text().splitlines()]
properties = torch.cuda.get_device_properties(0)
result = {
    "gpu": torch.cuda.get_device_name(0),
    "multiprocessors": properties.multi_processor_count,
    "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    "commit": commit(),
    "torch": torch.__version__,
    "parts": {name: {"status": status, "seconds": int(seconds)} for name, status, seconds in parts},
    "tests": tests(),
    "bench": {},
}
for backend in ("triton", "cuda"):
    path = work / f"bench_{backend}.json"
    if path.exists():
        result["bench"][backend] = json.loads(path.read_text())
name = "gpu_" + "_".join(result["gpu"].split()).replace("/", "-") + ".json"
(out / name).write_text(json.dumps(result, indent=1) + "\n")

lines = [f"{result['gpu']}  commit {result['commit'][:12]}  {result['date']}  torch {result['torch']}"]
for part, status, seconds in parts:
    lines.append(f"{part:14s} {'ok' if status == '0' else 'TIMEOUT' if status == '124' else status:>8s} {seconds:>5s} s")
if result["tests"]:
    for backend, count in sorted(result["tests"]["by_backend"].items()):
        lines.append(f"tests {backend:8s} " + "  ".join(f"{k} {v}" for k, v in count.items()))
    lines += [f"  FAILED {test}" for test in result["tests"]["failed"][:6]]
lines.append(f"{'operation / case':44s} {'backend':8s} {'ms':>9s} {'GB/s':>7s} {'limit':>6s}  best peer")
rows = []
for backend, facts in result["bench"].items():
    for case in facts["cases"]:
        ours, *peers = case["contenders"]
        best = min(peers, key=lambda p: p["median_ms"], default=None)
        peer = "" if best is None else f"{best['name']} {best['median_ms']:.3f} ms"
        label = f"{case['operation']} {case['case']} {case['dtype']} {'x'.join(map(str, case['shape']))}"
        rows.append(
            f"{label[:44]:44s} {backend:8s} {ours['median_ms']:9.3f} {ours['gbs']:7.0f} {ours['share_of_limit']:6.0%}  {peer}"
        )
room = 39 - len(lines)
lines += sorted(rows)[:room]
lines.append(f"written: {out / name}" + (f" ({len(rows) - room} more rows there)" if len(rows) > room else ""))
print("\n".join(line[:150] for line in lines))
sys.exit(0 if all(status == "0" or status.startswith(("skipped: compute-sanitizer", "skipped: CuPy")) for _, status, _ in parts) else 1)
PYTHON
