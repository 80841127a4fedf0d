#!/usr/bin/env bash
# Builds fastreward on a machine with an NVIDIA GPU (nvcc, torch, triton, no network), tests the GPU backends, runs
# compute-sanitizer over a small sample where it is present, then the benches. Under ten minutes: every part has a time
# limit, and those that follow each other come to 500 s (120 build, 170 tests, 50 + 50 + 110 benches); tests, of which
# no figure is wanted, run side by side. A part that fails or is stopped does not stop the next, and leaves what it has
# found until then. Ends with a table of at most 40 lines.
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
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
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
part build 120 "$python" -m pip install --no-build-isolation --no-deps --no-index --quiet --target "$work/site" "$repo" \
  -C cmake.define.FASTREWARD_CUDA=ON -C "cmake.define.FASTREWARD_CUDA_ARCHS=$capability-real" -C "build-dir=$work/build"
built=$?

# The installed package is what is tested: away from the checkout, whose own folder of that name has no modules built.
export PYTHONPATH="$work/site:$work/tools${PYTHONPATH:+:$PYTHONPATH}"
cp -r "$repo/tests" "$work/tests"
mkdir "$work/tools"
cp "$repo/tools/gpu_results.py" "$work/tools"
cd "$work" || exit 2

# tests NAME SECONDS [OPTIONS OF PYTEST]: a part of tests/$suite; outcomes in $work/NAME.tests as they come.
suite=backends/gpu/test_operations.py
tests() {
  local name="$1" limit="$2"
  shift 2
  GPU_RESULTS="$work/$name.tests" part "$name" "$limit" ${tool[@]+"${tool[@]}"} "$python" -m pytest \
    -c "$repo/pyproject.toml" --rootdir "$work" -p no:cacheprovider -p gpu_results -q -m gpu --tb=short -W default "$@" \
    "$work/tests/$suite"
}

# sanitize NAME SECONDS TOOL EXPRESSION: the tests that pytest's -k EXPRESSION picks, under compute-sanitizer.
sanitize() {
  local tool=(compute-sanitizer --tool "$3" --error-exitcode 9)
  tests "$1" "$2" -k "cuda and ($4)"
}

sanitized=(racecheck synccheck memcheck trees_racecheck trees_memcheck
  divergence_racecheck divergence_synccheck divergence_memcheck)
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 6)
one_of_each="(small_program and real and False) or (small_program and gspo and True) or (small_cluster and dtype0)"
one_of_each="$one_of_each or (small_logits and masked) or (small_whiten and True-True) or (small_segments and runs-False) or (small_group and grpo-False)"
one_of_each="$one_of_each or small_group_statistics or (small_token_rewards and end-False) or returns_in_tiles"
one_of_each="$one_of_each or (small_scans and (0] or 1]))"

if [ "$built" -eq 0 ]; then
  # ---------------------------------------------------------------------------------------------------------- tests
  tests programs 170 -k "program or TestPublic" ${workers[@]+"${workers[@]}"} &
  tests kernels 170 -k "not program and not TestPublic" ${workers[@]+"${workers[@]}"} &
  (
    suite=backends/gpu/test_prefix_tree.py
    tests trees 170 ${workers[@]+"${workers[@]}"}
  ) &
  (
    suite=backends/gpu/test_divergence.py
    tests divergence 170 ${workers[@]+"${workers[@]}"}
  ) &
  (
    suite=backends/gpu/test_credit_recipes.py
    tests credit 110
  ) &

  if "$python" -c 'import cupy' 2>/dev/null; then # the same .cu files, compiled by NVRTC
    (
      export FASTREWARD_CUDA_ROUTE=cupy
      tests cupy 60 -k "cuda and (small_logprobs or small_illegal or small_accumulate or small_group or small_segment or small_returns or small_token_rewards or small_whiten)"
    ) &
  else
    skip cupy "CuPy is not installed"
  fi

  if command -v compute-sanitizer >/dev/null; then
    (
      sanitize racecheck 60 racecheck "$one_of_each"
      sanitize synccheck 40 synccheck "$one_of_each"
      export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # every tensor its own allocation, so that its ends are guarded
      sanitize memcheck 70 memcheck \
        "$one_of_each or small_illegal or small_rescale or (small_logprobs and (strided or keep)) or small_logits"
    ) &
    (
      suite=backends/gpu/test_prefix_tree.py
      sanitize trees_racecheck 70 racecheck "small_values and (2] or 5])"
      export PYTORCH_NO_CUDA_MEMORY_CACHING=1
      sanitize trees_memcheck 70 memcheck "small_values and (2] or 5])"
    ) &
    (
      suite=backends/gpu/test_divergence.py
      sanitize divergence_racecheck 50 racecheck "small_rows"
      sanitize divergence_synccheck 40 synccheck "small_rows"
      export PYTORCH_NO_CUDA_MEMORY_CACHING=1
      sanitize divergence_memcheck 50 memcheck "small_rows"
    ) &
  else
    for name in "${sanitized[@]}"; do skip "$name" "compute-sanitizer is not on PATH"; done
  fi
  wait

  # ---------------------------------------------------------------------------------------------------------- bench
  # By what matters most. The peers are the same whatever our backend is, and take longest: most of them compile.
  bench=("$python" -m fastreward.cli bench logits_policy_loss logprobs divergence policy_loss linear_policy_loss
    linear_logprobs preference_loss correction group segments returns rewards whiten value_loss prefix_tree --device cuda --no-memory)
  for backend in triton cuda; do
    FASTREWARD_BACKEND=$backend part "bench_$backend" 50 "${bench[@]}" --seconds 0.5 --no-peers \
      --json "$work/bench_$backend.json"
  done
  FASTREWARD_BACKEND=triton part bench_peers 110 "${bench[@]}" --seconds 0.3 --json "$work/bench_peers.json"
else
  for name in programs kernels trees divergence credit cupy "${sanitized[@]}" bench_triton bench_cuda bench_peers; do
    skip "$name" "the build failed"
  done
fi

# ---------------------------------------------------------------------------------------------------- JSON and table
"$python" - "$work" "$out" "$repo" <<'PYTHON'
import datetime
import json
import pathlib
import subprocess
import sys

import torch

work, out, repo = map(pathlib.Path, sys.argv[1:])


def commit() -> str:
    try:
        run = subprocess.run(["git", "-C", str(repo), "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:  # no git here
        return "unknown"
    return run.stdout.strip() or "unknown"


def tests(name: str) -> dict[str, object] | None:
    """What a part's tests have come to, as far as it got."""
    path = work / f"{name}.tests"
    if not path.exists():
        return None
    cases = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    counts: dict[str, dict[str, int]] = {}
    for case in cases:
        backend = next((b for b in ("triton", "cuda") if b in case["test"].partition("[")[2]), "other")
        state = {"passed": "passed", "skipped": "skipped"}.get(case["outcome"], "failed")
        counts.setdefault(backend, {"passed": 0, "failed": 0, "skipped": 0})[state] += 1
    failed = [c for c in cases if c["outcome"] not in ("passed", "skipped")]
    slowest = sorted(cases, key=lambda c: -c["seconds"])[:5]
    return {
        "by_backend": counts,
        "failed": [{"test": c["test"], "message": c["message"]} for c in failed],
        "slowest": {c["test"]: c["seconds"] for c in slowest},
    }


def case_key(case: dict) -> tuple[object, ...]:
    return case["operation"], case["case"], case["dtype"], *case["shape"]


parts = [line.split("\t") for line in (work / "parts").read_text().splitlines()]
properties = torch.cuda.get_device_properties(0)
result = {
    "gpu": torch.cuda.get_device_name(0),
    "multiprocessors": properties.multi_processor_count,
    "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    "commit": commit(),
    "torch": torch.__version__,
    "parts": {name: {"status": status, "seconds": int(seconds)} for name, status, seconds in parts},
    "tests": {name: found for name, *_ in parts if (found := tests(name))},
    "bench": {},
}
for backend in ("triton", "cuda", "peers"):
    path = work / f"bench_{backend}.json"
    if path.exists():
        result["bench"][backend] = json.loads(path.read_text())
name = "gpu_" + "_".join(result["gpu"].split()).replace("/", "-") + ".json"
(out / name).write_text(json.dumps(result, indent=1) + "\n")

lines = [f"{result['gpu']}  commit {result['commit'][:12]}  {result['date']}  torch {result['torch']}"]
for part, status, seconds in parts:
    counts = [
        f"{backend} " + " ".join(f"{n} {state}" for state, n in count.items() if n)
        for backend, count in sorted(result["tests"].get(part, {"by_backend": {}})["by_backend"].items())
    ]
    state = "ok" if status == "0" else "TIMEOUT" if status in ("124", "137") else status
    lines.append(f"{part:14s} {state:>8s} {seconds:>5s} s  {', '.join(counts)}".rstrip())
failed = [f"  FAILED {part} {x['test']}: {x['message']}" for part, f in result["tests"].items() for x in f["failed"]]
lines += failed[:6]
lines.append(f"{'operation / case':44s} {'backend':8s} {'ms':>9s} {'GB/s':>7s} {'limit':>6s}  best peer")
rows = []
ours = {backend: result["bench"].get(backend, {"cases": []})["cases"] for backend in ("triton", "cuda", "peers")}
with_peers = {case_key(case): case for case in ours.pop("peers")}
for backend, cases in ours.items():
    for place, case in enumerate(cases):
        first = case["contenders"][0]
        beside = with_peers.get(case_key(case), case)["contenders"]
        peers = [p for p in beside if not p["name"].startswith("fastreward")]
        best = min(peers, key=lambda p: p["median_ms"], default=None)
        peer = "" if best is None else f"{best['name']} {best['median_ms']:.3f} ms"
        label = f"{case['operation']} {case['case']} {case['dtype']} {'x'.join(map(str, case['shape']))}"
        figures = f"{first['median_ms']:9.3f} {first['gbs']:7.0f} {first['share_of_limit']:6.0%}"
        rows.append((place, f"{label[:44]:44s} {backend:8s} {figures}  {peer}"))
room = 39 - len(lines)
lines += [row for _, row in sorted(rows)[:room]]
lines.append(f"written: {out / name}" + (f" ({len(rows) - room} more rows there)" if len(rows) > room else ""))
print("\n".join(line[:150] for line in lines))
sys.exit(0 if all(status == "0" or status.startswith(("skipped: compute-sanitizer", "skipped: CuPy")) for _, status, _ in parts) else 1)
PYTHON
