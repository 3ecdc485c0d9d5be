"""What is different on a CUDA GPU: attention over documents, half precision, compiled blocks."""

import shutil

import pytest
import torch
from torch.testing import assert_close
from toy import logged

from model import attention
from model.attention import VarlenMetadata, make_attention_mask, supports_varlen, varlen_metadata
from model.config import MiniMindConfig
from model.inference.generation import generate
from model.inference.sampling import SamplingParams
from trainer.common import loop
from trainer.common.hardware import autocast
from trainer.trainer_utils import COMPILE_STEPS

CUDA = torch.device("cuda")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
pytestmark = pytest.mark.usefixtures("in_a_hurry")
# Three rows: documents of 40, 1 and 23 tokens, then of 64, then of 7, 50 and 7.
LENGTHS = [[40, 1, 23], [64], [7, 50, 7]]
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])


@pytest.fixture
def ids():
    return torch.randint(128, POSITIONS.shape, generator=torch.Generator().manual_seed(0))


# -- varlen attention ------------------------------------------------------------------------------


def test_cu_seqlens_are_where_documents_start():
    cu_seqlens, max_seqlen = varlen_metadata(POSITIONS)
    assert cu_seqlens.tolist() == [0, 40, 41, 64, 128, 135, 185, 192]
    assert (cu_seqlens.dtype, max_seqlen) == (torch.int32, 64)


def test_a_row_begins_a_document_whatever_its_first_position():
    assert varlen_metadata(torch.tensor([[5, 6, 0], [0, 1, 2]])).cu_seqlens.tolist() == [0, 2, 3, 6]


@pytest.mark.parametrize(
    ("past", "attention_mask", "position_ids", "kind"),
    [
        (0, None, POSITIONS, VarlenMetadata),
        (0, None, POSITIONS[:1], VarlenMetadata),
        (0, torch.ones(3, 64), POSITIONS, torch.Tensor),
        (0, None, None, type(None)),
        (6, None, None, torch.Tensor),
    ],
)
def test_varlen_metadata_is_for_packed_rows_only(
    past, attention_mask, position_ids, kind, monkeypatch
):
    monkeypatch.setattr(attention, "supports_varlen", lambda hidden, head_dim: True)
    hidden = torch.zeros(3, 64, 8)
    visible = make_attention_mask(MiniMindConfig(), hidden, past, attention_mask, position_ids)
    assert isinstance(visible, kind)
    if kind is VarlenMetadata:
        assert visible.cu_seqlens[-1] == 3 * 64


def test_a_cpu_has_no_varlen_attention():
    assert not supports_varlen(torch.zeros(1, 2, 64, dtype=torch.bfloat16), 64)


@on_gpu
@pytest.mark.parametrize("fields", [{}, {"qk_norm": True}, {"num_key_value_heads": 4}], ids=str)
def test_documents_give_the_logits_and_gradients_of_the_mask(make_model, ids, fields, monkeypatch):
    model = make_model(**fields, initializer_range=0.1).to(CUDA)
    results = []
    for dtype, varlen in ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, False)):
        if not varlen:
            monkeypatch.setattr(attention, "supports_varlen", lambda hidden, head_dim: False)
        model.zero_grad()
        with autocast(CUDA, dtype):
            out = model(ids.to(CUDA), position_ids=POSITIONS.to(CUDA), labels=ids.to(CUDA))
        out.loss.backward()
        gradients = torch.cat([weight.grad.flatten() for weight in model.parameters()])
        results.append((out.logits.float(), gradients))
    documents, mask, exact = results
    for found, other, truth in zip(documents, mask, exact, strict=True):
        error, theirs = ((each - truth).norm() / truth.norm() for each in (found, other))
        assert error < 0.03 and error < 1.3 * theirs, (error, theirs)


@on_gpu
@torch.no_grad()
def test_changing_one_document_leaves_the_others_bit_equal(make_model, ids):
    model, changed = make_model().to(CUDA), ids.clone()
    changed[0, 41:] = (ids[0, 41:] + 1) % 128
    with autocast(CUDA, torch.bfloat16):
        before, after = (
            model(x.to(CUDA), position_ids=POSITIONS.to(CUDA)).logits for x in (ids, changed)
        )
    same = (before == after).all(-1)
    assert same[0, :41].all() and not same[0, 41:].any() and same[1:].all()


# -- training --------------------------------------------------------------------------------------


def losses(metrics: dict) -> list[float]:
    return [record["loss"] for record in logged(metrics) if "loss" in record]


PACKED = dict(packing=True, epochs=9, max_steps=6, val_share=0.2)


@on_gpu
@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        (dict(dtype="float32", compile=False), 1e-3),
        (dict(dtype="float32"), 1e-3),
        (dict(compile=False), 0.03),
        (dict(), 0.03),
        (dict(compile=False, dtype="float16"), 0.03),
        (dict(gradient_checkpointing=True), 0.03),
        (dict(compile=False, dropout=1e-6), 0.03),
    ],
    ids=str,
)
def test_a_gpu_learns_what_a_cpu_learns(any_stage, changes, tolerance):
    """float16 may overflow in the first step, until its scale is found: compared are the losses
    before any step, and at the end."""
    slow = losses(any_stage("cpu", **PACKED))
    fast = losses(any_stage("gpu", **PACKED, device="cuda", **changes))
    assert_close(fast[0], slow[0], rtol=0, atol=tolerance)
    if changes.get("dtype") != "float16":
        assert_close(fast, slow, rtol=0, atol=tolerance)


@on_gpu
def test_a_gpu_goes_on_where_it_was_stopped(train, killed):
    settings = dict(**PACKED, device="cuda", save_interval=3)
    whole = losses(train("whole", **settings))
    killed(3, train, "cut", **settings)
    assert_close(losses(train("cut", **settings, resume=True)), whole, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("device", "rows"), [("cpu", 1), pytest.param("cuda", 3, marks=on_gpu)], ids=["cpu", "cuda"]
)
def test_a_gpu_begins_with_full_batches(train, monkeypatch, device, rows):
    """It takes one in the time of a single row."""
    monkeypatch.setattr(loop, "INITIAL_BATCH_TOKENS", 1)
    train(batch_ramp=9, batch_size=3, accumulation_steps=2, max_steps=1, device=device)
    assert train.saved()["progress"]["samples_seen"] == rows


@on_gpu
@torch.no_grad()
def test_a_gpu_says_what_a_cpu_says(make_model, ids):
    prompts = [ids[0, :9].tolist(), ids[1, :4].tolist()]
    model, sampling = make_model(), SamplingParams(max_new_tokens=20, temperature=0)
    slow = list(generate(model, prompts, sampling))
    assert list(generate(model.to(CUDA), prompts, sampling)) == slow


# -- compiled blocks, on any machine ---------------------------------------------------------------


COMPILER = any(map(shutil.which, ("g++", "c++", "clang++")))


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_change_nothing(train):
    settings = dict(**PACKED, batch_ramp=1, batch_size=4)
    expected = losses(train("a", **settings))
    torch._dynamo.utils.counters.clear()
    found = losses(train("fast", **settings, compile=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert_close(found, expected, rtol=0, atol=2e-4)


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_resumed_run_is_compiled_too(train, killed):
    """Its first steps are not the run's."""
    settings = dict(packing=True, epochs=99, max_steps=COMPILE_STEPS + 3, save_interval=1)
    killed(COMPILE_STEPS + 1, train, "a", **settings)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train("a", resume=True, compile=True, **settings)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
