"""Checks of the CUDA kernels that need a GPU, one per name (see results/gpu_pending.md).

Run from the repository root: `python3 bench/gpu_probe.py NAME`, with a NAME of
stream|threads|devices|graph|assert|routes|million|approximate|time|flow. The exit status is 5 if the check needs more
GPUs than there are, and otherwise non-zero if it fails; `time` and `flow` write gpu_time.json and gpu_flow.json into
$OUT (default bench/results).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from cpr_fast.ops import cascade_select, cascade_select_ref, mil_nce, mil_nce_ref, tvl1_flow

# Shortest possible times on one H200 in microseconds at D = 128: the larger of bytes / 4.3 TB/s and operations / 60
# (fp32) or 790 (bf16) TFLOP/s, plus 2.5 for a launch. (B, K) -> fp32 and bf16 of each operator: cascade_select with two
# views, mil_nce with its gradient to the query.
FLOOR_US = {
    (32, 2048): (3.1, 2.8),
    (32, 16384): (7.0, 4.5),
    (256, 16384): (38, 5.2),
    (256, 65536): (146, 13),
    (1024, 65536): (575, 46),
    (1024, 1_000_000): (9200, 700),
}
FLOW_DEFAULTS = (0.25, 0.15, 0.3, 5, 0.8, 5, 0.01, 30, 10, 5)


def features(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, device="cuda"), dim=-1).to(dtype)


def cascade(B: int, K: int, stages: int = 7, top_k: int = 5, D: int = 128, dtype: torch.dtype = torch.float32) -> tuple:
    keep = [max(top_k, K >> s) for s in range(1, stages)] + [top_k]
    views = [1 if (stages - 1 - s) % 2 == 0 else 0 for s in range(stages)]
    return features(2, B, D, dtype=dtype), features(2, K, D, dtype=dtype), views, keep


def stream() -> None:
    """Checks that the kernels run on the current stream: they wait for a copy that was queued there before."""
    side = torch.cuda.Stream()
    inputs = cascade(64, 4096)
    expected = cascade_select(*inputs)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        late = torch.zeros_like(inputs[1])
        torch.cuda._sleep(200_000_000)  # keeps the stream busy: work on another stream would run first
        late.copy_(inputs[1])
        found = cascade_select(inputs[0], late, *inputs[2:])
    side.synchronize()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def threads() -> None:
    """Checks the stream of a second host thread: its calls wait for that stream alone, while the first thread calls the
    same kernels with smaller problems, which need less shared memory."""
    large, small = cascade(16, 16_384), cascade(16, 600)
    expected = cascade_select(*large), cascade_select(*small)
    torch.cuda.synchronize()

    def on_a_stream_of_its_own() -> tuple[torch.Tensor, ...]:
        with torch.cuda.stream(torch.cuda.Stream()):
            late = torch.zeros_like(large[1])
            torch.cuda._sleep(200_000_000)  # work on another stream would run before the copy
            late.copy_(large[1])
            found = cascade_select(large[0], late, *large[2:])
            torch.cuda.current_stream().synchronize()
        return found

    with ThreadPoolExecutor(1) as pool:
        for _ in range(20):
            started = pool.submit(on_a_stream_of_its_own)
            while not started.done():
                torch.testing.assert_close(cascade_select(*small), expected[1], rtol=0, atol=0)
            torch.testing.assert_close(started.result(), expected[0], rtol=0, atol=0)


def devices() -> None:
    """Checks a second GPU that is not the current one: every operator gives there the bits of the first, in calls of
    one thread and of a thread per GPU."""
    if torch.cuda.device_count() < 2:
        print("needs two GPUs")
        sys.exit(5)
    exact = cascade(40, 16_384)
    query, own_key, mined = features(40, 128).bfloat16(), features(40, 128).bfloat16(), torch.arange(40).cuda()[:, None]
    clips = moving_clips(2, 64, 80)

    def on(device: str) -> list[torch.Tensor]:
        inputs = [tensor.to(device) for tensor in (*exact[:2], query, own_key, mined, clips)]
        chosen, scores = cascade_select(*inputs[:2], *exact[2:])
        loss = mil_nce(*inputs[2:4], inputs[1][0].bfloat16(), inputs[4], reduction="none")
        return [tensor.cpu() for tensor in (chosen, scores, loss, tvl1_flow(inputs[5]))]

    expected = on("cuda:0")
    torch.testing.assert_close(on("cuda:1"), expected, rtol=0, atol=0)
    assert torch.cuda.current_device() == 0, "a call changed the current device"
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(on, ["cuda:0", "cuda:1"] * 20):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def graph() -> None:
    """Checks both operators in a CUDA graph that is replayed with inputs written after the capture, the temperature
    among them."""
    queries, memory, views, keep = cascade(32, 2048)
    query, own_key = features(32, 128).requires_grad_(), features(32, 128)
    temperature = torch.tensor(0.1, device="cuda", requires_grad=True)

    def step() -> tuple[torch.Tensor, ...]:
        mined, _ = cascade_select(queries, memory, views, keep)
        loss = mil_nce(query, own_key, memory[0], mined)
        learned = mil_nce(query, own_key, memory[0], mined, temperature=temperature)
        return mined, loss, learned, *torch.autograd.grad(loss + learned, (query, temperature))

    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        step()
    torch.cuda.current_stream().wait_stream(warm_up)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        outputs = step()
    for _ in range(3):
        with torch.no_grad():
            for tensor in (queries, memory, query, own_key):
                tensor.copy_(features(*tensor.shape))
            temperature.mul_(0.8)
        captured.replay()
        replayed = [output.clone() for output in outputs]
        torch.testing.assert_close(replayed, list(step()), rtol=0, atol=0)


def device_assert() -> None:
    program = (
        "import torch\nfrom cpr_fast.ops import mil_nce\nx = torch.ones(1, 8, device='cuda')\n"
        "mil_nce(x, x, x, torch.tensor([[1]], device='cuda'))\ntorch.cuda.synchronize()"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.returncode != 0, "a slot outside the memory was not noticed"
    assert "a slot outside the memory" in result.stderr, result.stderr


def routes() -> None:
    """Compares every route of cascade_select with the CPU kernel, at the sizes where the route changes."""
    for K in (1, 511, 16_384, 26_000, 27_000, 32_769, 60_000, 140_000, 400_000):
        for dtype in (torch.float32, torch.bfloat16):
            queries, memory, views, keep = cascade(35, K, top_k=min(600, K), D=36, dtype=dtype)
            ids = {"memory_ids": torch.randint(-1, 99, (K,), device="cuda"), "query_ids": torch.arange(35).cuda()}
            found = cascade_select(queries, memory, views, keep, **ids)
            on_cpu = {name: value.cpu() for name, value in ids.items()}
            expected = cascade_select(queries.cpu(), memory.cpu(), views, keep, **on_cpu)
            torch.testing.assert_close([t.cpu() for t in found], list(expected), rtol=0, atol=0, msg=f"{K=} {dtype=}")


def approximate() -> None:
    """Measures how much of the exact top 5 after 7 stages `precision="bf16"` finds for random unit vectors."""
    for B, K in FLOOR_US:
        inputs = cascade(min(B, 256), K)
        exact, _ = cascade_select(*inputs)
        found, _ = cascade_select(*inputs, precision="bf16")
        shared = (exact[:, :, None] == found[:, None, :]).any(2).float().mean().item()
        same = (exact.sort(1).values == found.sort(1).values).all(1).float().mean().item()
        print(f"B={B} K={K}: {shared:.3f} of the entries, {same:.3f} of the rows whole")
        assert shared > 0.8


def million() -> None:
    """Checks a memory of a million entries. Features on a lattice have exact float32 scores and many ties."""
    B, K, D = 70, 1_000_000, 128
    lattice = [torch.randint(-8, 9, (2, rows, D), device="cuda") / 4.0 for rows in (B, K)]
    ids = {"memory_ids": torch.randint(-1, 50_000, (K,), device="cuda"), "query_ids": torch.arange(B, device="cuda")}
    views, keep = [1, 0, 1], [K // 2, K // 4, 1000]
    found = cascade_select(*lattice, views, keep, **ids)
    expected = cascade_select_ref(*lattice, views, keep, **ids)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    query, own_key, memory = features(B, D), features(B, D), features(K, D)
    loss = mil_nce(query, own_key, memory, found[0][:, :5].contiguous(), reduction="none")
    truth = mil_nce_ref(query.double(), own_key.double(), memory.double(), found[0][:, :5], reduction="none")
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)


def replay_us(issue, repeats: int = 30) -> float:
    """Returns the median time in microseconds of replays of `issue`, captured in a CUDA graph, with warm caches."""
    issue()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        issue()
    times = []
    for _ in range(repeats + 5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        captured.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return sorted(times[5:])[repeats // 2]


def time() -> None:
    rows = []
    for (B, K), (fp32_us, bf16_us) in FLOOR_US.items():
        exact, halves = cascade(B, K), cascade(B, K, dtype=torch.bfloat16)
        calls = {
            ("cascade_select", "fp32", fp32_us): lambda exact=exact: cascade_select(*exact),
            ("cascade_select", "bf16", bf16_us): lambda halves=halves: cascade_select(*halves, precision="bf16"),
            ("cascade_select", "bf16 of fp32", None): lambda exact=exact: cascade_select(*exact, precision="bf16"),
        }
        for dtype, floor_us in ((torch.float32, fp32_us), (torch.bfloat16, bf16_us)):
            query, own_key = features(B, 128, dtype=dtype).requires_grad_(), features(B, 128, dtype=dtype)
            memory, mined = exact[1][0].to(dtype), torch.randint(K, (B, 5), device="cuda")

            def loss(query=query, own_key=own_key, memory=memory, mined=mined):
                torch.autograd.grad(mil_nce(query, own_key, memory, mined), query)

            calls["mil_nce", str(dtype)[6:], floor_us] = loss
        for (op, precision, floor_us), call in calls.items():
            time_us = replay_us(call)
            rows.append({"op": op, "B": B, "K": K, "D": 128, "precision": precision, "time_us": round(time_us, 1)})
            rows[-1] |= {"floor_us": floor_us, "ratio": floor_us and round(time_us / floor_us, 2)}
            print(*rows[-1].values(), sep="\t")
    out = Path(os.environ.get("OUT", "bench/results"))
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
    (out / "gpu_time.json").write_text(json.dumps(report, indent=1))


def moving_clips(pairs: int, height: int, width: int) -> torch.Tensor:
    """Returns uint8 [pairs, 2, H, W]: smooth noise that moves by up to 3 pixels."""
    noise = torch.rand(pairs, 1, height // 4 + 4, width // 4 + 4, device="cuda")
    large = torch.nn.functional.interpolate(noise, scale_factor=4, mode="bicubic").clamp(0, 1)
    shifts = torch.randint(4, (pairs, 2)).tolist()
    second = torch.stack([large[i, 0, y : y + height, x : x + width] for i, (y, x) in enumerate(shifts)])
    return (torch.stack([large[:, 0, :height, :width], second], 1) * 255).to(torch.uint8)


def flow() -> None:
    """Compares tvl1_flow with the CPU kernel and with itself, and measures pairs per second at 340x256."""
    clips = moving_clips(24, 256, 340)
    found, counted = torch.ops.cpr_fast.tvl1_flow(clips, *FLOW_DEFAULTS)
    assert torch.equal(found, tvl1_flow(clips)), "two runs differ"
    expected, expected_count = torch.ops.cpr_fast.tvl1_flow(clips.cpu(), *FLOW_DEFAULTS)
    error = (found.cpu() - expected).norm(dim=2)
    print(
        f"equal pairs {sum(map(torch.equal, found.cpu(), expected))} of {len(clips)}, mean error {error.mean():.2e} px"
    )
    assert error.mean() <= 0.05 and error.quantile(0.99) <= 0.5
    assert abs(counted.sum().item() / expected_count.sum().item() - 1) <= 0.02
    rows = []
    for pairs in (1, 8, 32, 132, 264, 528):
        clips = moving_clips(pairs, 256, 340)
        iterations = torch.ops.cpr_fast.tvl1_flow(clips, *FLOW_DEFAULTS)[1].sum().item()
        time_us = replay_us(lambda clips=clips: tvl1_flow(clips), repeats=5)
        rows.append(
            {"pairs": pairs, "pairs_per_s": round(pairs / time_us * 1e6, 1), "time_ms": round(time_us / 1e3, 2)}
        )
        rows[-1]["ns_per_pixel_iteration"] = round(time_us * 1e3 / iterations, 4)
        print(*rows[-1].values(), sep="\t")
    out = Path(os.environ.get("OUT", "bench/results"))
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "size": "340x256", "rows": rows}
    (out / "gpu_flow.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    checks = {
        "stream": stream,
        "threads": threads,
        "devices": devices,
        "graph": graph,
        "assert": device_assert,
        "routes": routes,
        "million": million,
    }
    checks |= {"approximate": approximate, "time": time, "flow": flow}
    if len(sys.argv) != 2 or sys.argv[1] not in checks:
        raise SystemExit(f"usage: gpu_probe.py {'|'.join(checks)}")
    torch.manual_seed(0)
    checks[sys.argv[1]]()
    print("ok")
