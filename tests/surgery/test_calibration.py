"""Calibration against autograd through transformers, and what it is for: new rows that start well."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import MultivariateNormal
from transformers import LlamaForCausalLM

from megatron_cpt.checkpoint import LlamaForward, open_hf
from megatron_cpt.checkpoint.llama import EMBEDDING, HEAD
from megatron_cpt.cli.main import main
from megatron_cpt.config.surgery import CalibrationConfig, parse_calibration, parse_method
from megatron_cpt.data import Batch, CalibrationText, Document, IndexedDataset, build_dataset
from megatron_cpt.errors import CheckpointError, ConfigError, DataError, InputError, TooLittleText
from megatron_cpt.surgery import RowMaker, SurgeryPlan, apply_surgery, calibrate, plan_surgery
from megatron_cpt.surgery.calibration import log_frequencies, piece_vectors
from megatron_cpt.surgery.calibration.prior import _Logits, directions, nothing, vector_directions
from megatron_cpt.surgery.calibration.steps import _gradient, _Matrix
from megatron_cpt.surgery.planned import PlannedReader
from megatron_cpt.tokenizer import VocabMap
from tests.surgery.conftest import ENGLISH, JAPANESE, Make

SEQ = 24


@pytest.fixture
def plan(vocab_map: VocabMap) -> SurgeryPlan:
    return plan_surgery(vocab_map)


@pytest.fixture(scope="module")
def datasets(new_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(English, Japanese) datasets of the new tokenizer."""
    draw = np.random.default_rng(4)
    folder = tmp_path_factory.mktemp("calibration")
    for language, words, between in (("en", ENGLISH, " "), ("ja", JAPANESE, "")):
        texts = [Document(between.join(draw.choice(words, 12)), language, "test") for _ in range(150)]
        build_dataset(texts, new_tokenizer, folder / language, language)
    return folder / "en", folder / "ja"


def text_of(datasets: tuple[Path, Path], plan: SurgeryPlan, source_share: float = 0.5) -> CalibrationText:
    return CalibrationText([datasets[0]], [datasets[1]], plan.new_sha256, SEQ, source_share, 1)


def nats(plan: SurgeryPlan, base: Path, tokens: Batch) -> float:
    forward = LlamaForward(PlannedReader(open_hf(base), plan))
    packed = torch.from_numpy(tokens.tokens_N)[None], torch.from_numpy(tokens.labels_N)[None]
    return float(forward.token_nats(*packed, torch.from_numpy(tokens.cu_seqlens)).sum()) / int((packed[1] >= 0).sum())


def test_the_prior_is_the_frequency_where_new_pieces_belong(
    plan: SurgeryPlan, make_model: Make, datasets: tuple[Path, Path]
) -> None:
    base = make_model(plan.old_size)
    text = text_of(datasets, plan)
    held_out = text.take(960)
    settings = CalibrationConfig(prior_tokens=2400, seq_length=SEQ, dimension=0)
    made, facts = calibrate(plan, open_hf(base), text, settings)
    assert facts["tokens"] == 2400 and facts["prior"]["nats_after"] < facts["prior"]["nats_before"] - 0.1
    assert nats(made, base, held_out) < nats(plan, base, held_out) - 0.5
    # Rows follow the formula; kept ones and the embedding stay.
    last = made.head.adjustment
    assert last is not None and made.embedding.adjustment is None
    old_VD = open_hf(base).read(HEAD)
    before, after = (RowMaker(each.head, old_VD).rows(0, plan.new_size) for each in (plan, made))
    new = plan.head.new_rows
    assert torch.equal(after[: plan.old_size], old_VD)
    counts = text.counts()
    prior = torch.from_numpy(np.log((counts[new.numpy()] + 0.5) / counts.sum())).float()
    truth = before[new] * facts["prior"]["keep"] + last.offset_D + prior[:, None] * last.directions_FD[0]
    torch.testing.assert_close(after[new], truth, rtol=1e-4, atol=1e-5)
    assert torch.equal(log_frequencies(plan.head, counts), last.features_NF[:, 0])


def test_vectors_are_told_to_both_matrices(
    plan: SurgeryPlan, make_model: Make, new_tokenizer: Path, datasets: tuple[Path, Path], tmp_path: Path
) -> None:
    """The rows are those of the formulas, and held-out text is predicted better than from frequencies alone."""
    base = make_model(plan.old_size)
    draw = np.random.default_rng(4)
    rounds = [np.roll(JAPANESE, draw.integers(len(JAPANESE)))[:12] for _ in range(150)]  # each word has its next one
    build_dataset([Document("".join(words), "ja", "test") for words in rounds], new_tokenizer, tmp_path / "ja", "ja")
    datasets = datasets[0], tmp_path / "ja"
    text = text_of(datasets, plan)
    held_out = text.take(960)
    settings = CalibrationConfig(prior_tokens=4800, seq_length=SEQ, dimension=8, counted_tokens=3000)
    made, facts = calibrate(plan, open_hf(base), text, settings)
    plain, _ = calibrate(plan, open_hf(base), text_of(datasets, plan), settings.model_copy(update={"dimension": 0}))
    assert nats(made, base, held_out) < nats(plain, base, held_out) - 0.05
    new, x_NE = plan.head.new_rows, piece_vectors(plan, text, settings)
    known = x_NE.any(dim=1)
    assert int(known.sum()) > 10 and x_NE.shape == (len(new), 8)
    assert float(x_NE[known].mean(dim=0).abs().max()) < 1e-5 and float(x_NE[known].norm(dim=1).mean()) == pytest.approx(
        1
    )

    tables = {name: open_hf(base).read(name) for name in (EMBEDDING, HEAD)}
    before, after = (
        {name: RowMaker(matrix, tables[name]).rows(0, plan.new_size) for name, matrix in both.items()}
        for both in ({EMBEDDING: each.embedding, HEAD: each.head} for each in (plan, made))
    )
    assert all(torch.equal(after[name][: plan.old_size], table) for name, table in tables.items())
    moved = (after[EMBEDDING] - before[EMBEDDING])[new].double()
    assert not moved[~known].any()
    length = tables[EMBEDDING].double().norm(dim=1).mean()
    # A rotation keeps every inner product of vectors.
    torch.testing.assert_close(
        moved @ moved.T, (0.5 * length) ** 2 * (x_NE.double() @ x_NE.double().T), rtol=1e-4, atol=1e-5
    )
    last = made.head.adjustment
    assert last is not None and torch.equal(last.features_NF[:, 1:], x_NE)
    truth = before[HEAD][new].double() * facts["prior"]["keep"] + last.offset_D.double()
    truth += last.features_NF.double() @ last.directions_FD.double()
    torch.testing.assert_close(after[HEAD][new].double(), truth, rtol=1e-4, atol=1e-5)


def test_the_table_of_a_tied_model_is_made_as_a_head(
    plan: SurgeryPlan, make_model: Make, new_tokenizer: Path, datasets: tuple[Path, Path], tmp_path: Path
) -> None:
    """The plan survives its file, and what apply writes with it predicts held-out text better."""
    base = make_model(plan.old_size, tied=True)
    text = text_of(datasets, plan)
    held_out = text.take(960)
    settings = CalibrationConfig(prior_tokens=4800, seq_length=SEQ, dimension=8)
    stepped, _ = calibrate(plan, open_hf(base), text_of(datasets, plan), settings.model_copy(update={"steps": 2}))
    stepped.save(tmp_path / "stepped")
    apply_surgery(SurgeryPlan.load(tmp_path / "stepped"), base, tmp_path / "after steps", new_tokenizer)
    made, facts = calibrate(plan, open_hf(base), text, settings)
    made.save(tmp_path / "plan")
    apply_surgery(SurgeryPlan.load(tmp_path / "plan"), base, tmp_path / "operated", new_tokenizer)
    table = open_hf(tmp_path / "operated").read(EMBEDDING)
    old_VD, new, last = open_hf(base).read(EMBEDDING), plan.head.new_rows, made.head.adjustment
    assert last is not None and torch.equal(table[: plan.old_size], old_VD)
    truth = RowMaker(plan.head, old_VD).rows(0, plan.new_size)[new].double() * facts["prior"]["keep"]
    truth += last.offset_D.double() + last.features_NF.double() @ last.directions_FD.double()
    torch.testing.assert_close(table[new].double(), truth, rtol=1e-4, atol=1e-5)
    assert nats(made, base, held_out) < nats(plan, base, held_out) - 0.3


def test_a_text_too_short_for_vectors_gives_frequencies(
    plan: SurgeryPlan, make_model: Make, datasets: tuple[Path, Path]
) -> None:
    base = make_model(plan.old_size)
    settings = CalibrationConfig(prior_tokens=2400, seq_length=SEQ, dimension=8, counted_tokens=4)
    made, _ = calibrate(plan, open_hf(base), text_of(datasets, plan), settings)
    plain, _ = calibrate(plan, open_hf(base), text_of(datasets, plan), settings.model_copy(update={"dimension": 0}))
    assert made.embedding.adjustment is None
    head_VD = open_hf(base).read(HEAD)
    rows = [RowMaker(each.head, head_VD).rows(0, plan.new_size) for each in (made, plain)]
    assert torch.equal(*rows)


def test_vector_directions_are_the_linear_gaussian_model() -> None:
    """Differences of log likelihoods between pieces, by torch's own normal distribution, where h . t is 1."""
    draw = torch.Generator().manual_seed(5)
    hidden = torch.randn(900, 6, generator=draw) + 2.0
    vectors = hidden[:, :3] @ torch.randn(3, 4, generator=draw) + 0.3 * torch.randn(900, 4, generator=draw)
    h, x = hidden.double(), vectors.double()
    target = torch.linalg.pinv(h[:5]).sum(dim=1)
    found_ED = vector_directions(hidden, vectors, target)
    centred = h - h.mean(dim=0)
    ridge = 0.3 * centred.square().mean() * torch.eye(6, dtype=torch.float64)
    slope = torch.linalg.inv(centred.T @ centred / 900 + ridge) @ (centred.T @ x / 900)
    left = x - centred @ slope
    spread = left.T @ left / 900 + 0.1 * left.square().mean() * torch.eye(4, dtype=torch.float64)
    quadratic = 0.5 * (x[10] @ torch.linalg.solve(spread, x[10]) - x[20] @ torch.linalg.solve(spread, x[20]))
    normal = MultivariateNormal(centred[:5] @ slope, spread)
    expected = normal.log_prob(x[10]) - normal.log_prob(x[20]) + quadratic
    torch.testing.assert_close(h[:5] @ found_ED.T @ (x[10] - x[20]), expected, rtol=1e-8, atol=1e-8)


def test_directions_tell_where_new_pieces_follow() -> None:
    generator = torch.Generator().manual_seed(2)
    is_new = torch.rand(4000, generator=generator) < 0.4
    hidden = torch.randn(4000, 16, generator=generator) + torch.where(is_new[:, None], 2.0, -1.0) * torch.eye(16)[3]
    hidden[:, 5] = 3.0  # a constant, as an offset needs it
    target_D, source_D = directions(hidden, is_new)
    gram = hidden.double().T @ hidden.double() / 4000
    ridge = gram + 0.1 * gram.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    truth = torch.linalg.inv(ridge) @ (hidden.double().T @ is_new.double() / 4000)
    torch.testing.assert_close(target_D, truth, rtol=1e-8, atol=1e-10)
    scores = hidden.double() @ target_D
    assert float(scores[is_new].mean()) > 0.6 and float(scores[~is_new].mean()) < 0.3
    assert float((hidden.double() @ source_D)[is_new].mean()) < 0.3


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_gradients_against_transformers(
    plan: SurgeryPlan, make_model: Make, new_tokenizer: Path, datasets: tuple[Path, Path], tmp_path: Path, tied: bool
) -> None:
    """The streamed gradient of every number, by autograd through the whole model in float64."""
    base = make_model(plan.old_size, tied)
    text = text_of(datasets, plan)
    tokens = text.take(4 * SEQ)
    forward = LlamaForward(PlannedReader(open_hf(base), plan), cache=True)
    start = replace(
        nothing(plan.head, 32),
        features_NF=log_frequencies(plan.head, text.counts())[:, None],
        directions_FD=torch.zeros(1, 32),
    )
    head = _Matrix(forward, plan.head, EMBEDDING if tied else HEAD, start, 2, 7, 10.0)
    embedding = head if tied else _Matrix(forward, plan.embedding, EMBEDDING, nothing(plan.embedding, 32), 0, 7, 10.0)
    loss = _gradient(forward, embedding, head, tokens)

    apply_surgery(plan, base, tmp_path / "made", new_tokenizer)
    network = LlamaForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float64)
    numbers = {}
    for name, matrix in {"head": head, "embedding": embedding}.items():
        for part in ("scale", "offset_D", "direction_D", "down_DR", "up_RD"):
            numbers[name, part] = getattr(matrix, part).detach().double().requires_grad_(True)
    tables = {}
    for name, matrix in {"head": head, "embedding": embedding}.items():
        scale, offset, direction, down, up = (
            numbers["head" if tied else name, part] for part in ("scale", "offset_D", "direction_D", "down_DR", "up_RD")
        )
        table = (network.lm_head if name == "head" else network.model.embed_tokens).weight.detach().clone()
        rows = table[plan.head.new_rows]
        feature = matrix.features_RF[:, :1].double() if matrix.features_RF.shape[1] else torch.zeros(1, 1)
        rows = rows * (1 + scale) + matrix.unit * offset + feature * matrix.direction_unit * direction
        tables[name] = table.index_copy(0, plan.head.new_rows, rows + (table[plan.head.new_rows] @ down) @ up)
    total, count = 0.0, int((tokens.labels_N >= 0).sum())
    for first, last in zip(tokens.cu_seqlens[:-1], tokens.cu_seqlens[1:], strict=True):
        ids, labels = (torch.from_numpy(each[first:last]) for each in (tokens.tokens_N, tokens.labels_N))
        hidden = network.model(inputs_embeds=tables["embedding"][ids][None]).last_hidden_state[0]
        total = total + F.cross_entropy(hidden @ tables["head"].T, labels, ignore_index=-100, reduction="sum")
    mean = total / count
    mean.backward()
    assert loss == pytest.approx(float(mean.detach()), rel=1e-5)
    checked = 0
    for name, matrix in {"head": head, "embedding": embedding}.items():
        for part in ("scale", "offset_D", "direction_D", "down_DR", "up_RD"):
            found, truth = getattr(matrix, part).grad, numbers["head" if tied else name, part].grad
            if found is None or truth is None:
                continue
            torch.testing.assert_close(found.double(), truth, rtol=2e-3, atol=2e-5 * float(truth.abs().max() + 1e-6))
            checked += 1
    assert checked >= 6


def test_steps_lower_the_loss(plan: SurgeryPlan, make_model: Make, datasets: tuple[Path, Path]) -> None:
    base = make_model(plan.old_size)
    settings = CalibrationConfig(prior_tokens=0, steps=15, step_tokens=240, seq_length=SEQ, rank=2, learning_rate=0.3)
    text = text_of(datasets, plan)
    held_out = text.take(960)
    made, facts = calibrate(plan, open_hf(base), text, settings)
    assert made.embedding.adjustment is not None and made.head.adjustment is not None
    assert nats(made, base, held_out) < nats(plan, base, held_out) - 0.1
    assert facts["steps"]["nats_last"] < facts["steps"]["nats_first"]
    # It begins from the methods' rows, not on top of the last calibration.
    again, plain = (calibrate(one, open_hf(base), text_of(datasets, plan), settings)[0] for one in (made, plan))
    assert again.head.adjustment is not None and plain.head.adjustment is not None
    assert torch.equal(again.head.adjustment.offset_D, plain.head.adjustment.offset_D)


def test_steps_begin_with_the_rows_that_the_prior_made(
    plan: SurgeryPlan, make_model: Make, datasets: tuple[Path, Path]
) -> None:
    """The loss of the first step is that of the plan itself; only the frequency's direction is learnt."""
    base = open_hf(make_model(plan.old_size))
    prior = {"prior_tokens": 2400, "seq_length": SEQ, "dimension": 8}
    settings = CalibrationConfig(**prior, steps=1, step_tokens=240, learning_rate=1e-9)
    made, facts = calibrate(plan, base, text_of(datasets, plan), settings)
    text = text_of(datasets, plan)
    for count in (2400, 240):
        text.take(count)
    assert facts["steps"]["nats_first"] == pytest.approx(nats(made, base.folder, text.take(240)), abs=1e-4)
    moved, _ = calibrate(plan, base, text_of(datasets, plan), settings.model_copy(update={"learning_rate": 0.3}))
    assert moved.embedding.adjustment is not None and made.embedding.adjustment is not None
    assert torch.equal(moved.embedding.adjustment.directions_FD, made.embedding.adjustment.directions_FD)
    assert made.row(int(plan.head.new_rows[0]))["embedding"]["then"] == "calibrated"
    assert "then" not in made.row(5)["head"]


def test_the_command(
    plan: SurgeryPlan,
    make_model: Make,
    new_tokenizer: Path,
    datasets: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = make_model(plan.old_size)
    plan.save(tmp_path / "plan", new_tokenizer)
    words = ["surgery", "calibrate", str(tmp_path / "plan"), str(base), "--target", str(datasets[1]), "--source"]
    sizes = ["--set", "prior_tokens=2400", "--set", "steps=2", "--set", "step_tokens=240", "--set", f"seq_length={SEQ}"]
    assert main([*words, str(datasets[0]), "--output", str(tmp_path / "made"), *sizes, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tokens"] == 2400 + 3 * 240
    loaded = SurgeryPlan.load(tmp_path / "made")
    assert loaded.facts()["calibrated"] == {"embedding": True, "head": True}
    assert main(["surgery", "apply", str(tmp_path / "made"), str(base), str(tmp_path / "applied")]) == 0
    capsys.readouterr()
    for more, message in (
        (["--set", "rounds=3"], "no setting rounds: expected one of prior_tokens"),
        (["--set", "steps=-1"], "steps is -1"),
    ):
        assert main([*words, str(datasets[0]), "--output", str(tmp_path / "no"), *more]) == 2
        assert message in capsys.readouterr().err
    assert main([*words, str(tmp_path / "nowhere"), "--output", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists()


def test_text_of_one_language_is_not_enough(plan: SurgeryPlan, make_model: Make, datasets: tuple[Path, Path]) -> None:
    base = make_model(plan.old_size)
    text = text_of(datasets, plan, 0.999)
    with pytest.raises(TooLittleText, match=r"of the \d+ labels .* to, 0 are new pieces, expected at least 200"):
        calibrate(plan, open_hf(base), text, CalibrationConfig(prior_tokens=2400, seq_length=SEQ))
    with pytest.raises(DataError):
        CalibrationText([datasets[0]], [datasets[1]], "0" * 64, SEQ, 0.5, 1)
    with pytest.raises(ConfigError, match="source_share is 1"):
        parse_calibration({"source_share": 1})
    with pytest.raises(ConfigError, match="calibration: got .*, expected prior_tokens or steps above 0"):
        parse_calibration({"prior_tokens": 0})
    with pytest.raises(ConfigError, match="calibration: got 'x', expected settings"):
        parse_calibration("x")
    with pytest.raises(ConfigError, match="dimension is 2000; Input should be less than or equal to 1024"):
        parse_calibration({"dimension": 2000})


def test_each_text_is_read_once_at_most(
    plan: SurgeryPlan, make_model: Make, new_tokenizer: Path, datasets: tuple[Path, Path], tmp_path: Path
) -> None:
    """Also where a small dataset stands beside a large one, which does not end the reading of that."""
    draw = np.random.default_rng(5)
    texts = [Document("".join(draw.choice(JAPANESE, 12)), "ja", "test") for _ in range(9)]
    build_dataset(texts, new_tokenizer, tmp_path / "small", "ja")
    for targets in ([datasets[1]], [datasets[1], tmp_path / "small"]):
        text = CalibrationText([datasets[0]], targets, plan.new_sha256, SEQ, 0.5, 1)
        once = text.num_tokens
        samples = text.take(once).tokens_N.reshape(-1, SEQ)
        assert len(np.unique(samples, axis=0)) == len(samples)
        more = np.concatenate([samples, text.take(8 * SEQ).tokens_N.reshape(-1, SEQ)])
        assert len(np.unique(more, axis=0)) < len(more)
        assert once > 1.6 * IndexedDataset(datasets[1]).num_tokens
    settings = CalibrationConfig(prior_tokens=1 << 20, seq_length=SEQ, dimension=0)
    text = text_of(datasets, plan)
    _, facts = calibrate(plan, open_hf(make_model(plan.old_size)), text, settings)
    assert facts["tokens"] == text.num_tokens
    build_dataset(texts[:1], new_tokenizer, tmp_path / "tiny", "ja")
    short = CalibrationText([datasets[0]], [tmp_path / "tiny"], plan.new_sha256, 512, 0.5, 1)
    with pytest.raises(TooLittleText):
        calibrate(plan, open_hf(make_model(plan.old_size)), short, settings)


def test_rows_that_no_numbers_make_better_stay(
    plan: SurgeryPlan, make_model: Make, datasets: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both matrices; and a fit that ends in NaN is none."""
    settings = CalibrationConfig(prior_tokens=2400, seq_length=SEQ, dimension=8)
    for loss in (1e9, float("nan")):
        monkeypatch.setattr(_Logits, "_from", lambda self, start, loss=loss: (loss, (2.0, 1.0, 1.0, 1.0)))
        made, facts = calibrate(plan, open_hf(make_model(plan.old_size)), text_of(datasets, plan), settings)
        assert made.embedding.adjustment is None and made.head.adjustment is None
        assert facts["prior"]["nats_after"] == facts["prior"]["nats_before"]


def test_the_base_has_to_be_the_one_of_the_plan(
    vocab_map: VocabMap, plan: SurgeryPlan, make_model: Make, datasets: tuple[Path, Path], new_tokenizer: Path
) -> None:
    base, settings = make_model(plan.old_size), CalibrationConfig(prior_tokens=2400, seq_length=SEQ)
    anew = plan_surgery(vocab_map, parse_method({"method": "normal", "copy_kept": False}))
    with pytest.raises(InputError, match="copy_kept: false"):
        calibrate(anew, open_hf(base), text_of(datasets, plan), settings)
    shutil.copyfile(new_tokenizer / "tokenizer.model", base / "tokenizer.model")
    with pytest.raises(CheckpointError, match="this checkpoint is extended"):
        calibrate(plan, open_hf(base), text_of(datasets, plan), settings)
