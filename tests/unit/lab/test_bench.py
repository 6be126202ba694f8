"""The parts of a benchmark: defenses as text, profiles, lines, expectations, plots."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcbguard_plugins.defenses import FlipGuard, Noise
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.lab.bench.defense_specs import parse_defense, signature
from qcbguard_plugins.lab.bench.expectations import check_all
from qcbguard_plugins.lab.bench.output import draw_all, write_results
from qcbguard_plugins.lab.bench.parameter_sweeps import find_grids, find_sweeps
from qcbguard_plugins.lab.bench.profile import PROFILES_DIR, BenchProfile, DefenseEntry, read_profile
from qcbguard_plugins.lab.bench.results import FULL, STOCK, BenchReport, Cell, Machine, Place, Variant
from qcbguard_plugins.lab.bench.runner import num_cells
from qcbguard_plugins.lab.bench.summary import find, summarize
from qcbguard_plugins.lab.bench.tables import asr_rows, attacker_rows, clean_rows, utility_rows
from qcbguard_plugins.lab.evaluation import GuardCost, Measurement
from qcbguard_plugins.lab.intervals import Estimate, share
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("spec", "defense"),
    [("flipguard", FlipGuard()), ("flipguard(share=0.25)", FlipGuard(0.25)), (" noise( sigma = 0.1 ) ", Noise(0.1))],
)
def test_a_defense_is_spelled_as_a_call(spec: str, defense: object) -> None:
    assert parse_defense(spec) == defense


@pytest.mark.parametrize("spec", ["", "Noise", "noise(sigma)", "noise(sigma=)", "noise(0.1)", "noise(sigma=0.1", "no"])
def test_what_is_no_defense(spec: str) -> None:
    with pytest.raises(UsageError):
        parse_defense(spec)


def test_a_signature_tells_parameters_and_code_apart() -> None:
    ours, theirs = signature(parse_defense("noise(sigma=0.1)")), signature(parse_defense("noise(sigma=0.2)"))
    assert ours["source_sha256"] == theirs["source_sha256"] != signature(parse_defense("qvec"))["source_sha256"]
    assert ours != theirs


MINIMAL = """\
name: tiny
attacks:
  content: {scenario: content-injection}
defenses: [stochastic]
"""


def _profile(tmp_path: Path, text: str) -> BenchProfile:
    path = tmp_path / "tiny.yaml"
    path.write_text(text, encoding="utf-8")
    return read_profile(str(path))


def test_every_shipped_profile_is_sound() -> None:
    names = sorted(path.stem for path in PROFILES_DIR.glob("*.yaml") if "\nname:" in path.read_text(encoding="utf-8"))
    assert {"quick", "full", "ablation", "strength"} <= set(names)
    for name in names:
        assert read_profile(name).name == name


def test_the_example_of_the_page_is_sound(tmp_path: Path) -> None:
    page = (ROOT / "benchmarks" / "pages" / "benchmark_page.md.j2").read_text(encoding="utf-8")
    profile = _profile(tmp_path, page.split("```yaml\n")[1].split("```")[0])
    assert profile.row_names == ["elq-nf4-content", "my-model"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("defenses: [stochastic]", "defences: [stochastic]", "line 4: defences: Extra inputs are not permitted"),
        ("defenses: [stochastic]", "defenses: [qvec, magic]", "line 4: defenses.1: unknown method 'magic'"),
        ("content-injection", "contents", "line 3: attacks.content: unknown scenario 'contents'"),
        ("defenses: [stochastic]", "num_pairs: 0", "line 4: num_pairs: Input should be greater than"),
        ("name: tiny\n", "", "line 1: .name: Field required"),
        ("name: tiny", "name: tiny\nname: twice", "line 2: name"),
        ("defenses: [stochastic]", "rows: {contnet: {}}", "nothing matches 'contnet'"),
        ("[stochastic]", "[stochastic]\nrecommended: feedback", "no defense is called 'feedback'"),
        ("[stochastic]", "[stochastic, stochastic]", "two defenses are called 'stochastic'"),
        ("defenses: [stochastic]", "rows: {content: {formats: [nf5]}}", "nf5"),
        ("defenses: [stochastic]", "expect: [{live: {rows: x, full_at_most: 1, stock_at_least: 2}}]", "no row matches"),
        ("name: tiny", "name: [", "is not YAML"),
        (MINIMAL, "3", "holds no keys"),
    ],
)
def test_what_is_wrong_with_a_profile_is_told_with_its_place(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in MINIMAL
    with pytest.raises(UsageError) as error:
        _profile(tmp_path, MINIMAL.replace(old, new))
    assert message in str(error.value)


def test_a_profile_takes_attacks_over_from_another(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("attacks: {code: {scenario: vulnerable-code, format: fp4}}\n")
    profile = _profile(tmp_path, MINIMAL + f"include: [{tmp_path / 'base.yaml'}]\n")
    assert profile.row_names == ["code", "content"]
    assert profile.formats_of("code") == ["fp4"]


def test_rows_are_chosen_and_set_by_pattern(tmp_path: Path) -> None:
    attacks = "attacks: {a-nf4: {}, b-nf4: {}, b-fp4: {format: fp4}}\n"
    rows = 'skip: ["*-fp4"]\nrows: {b-*: {adaptive: true, seeds: [1, 2]}}\n'
    profile = _profile(tmp_path, "name: tiny\ndefenses: [{spec: qvec, rows: [a-*]}]\n" + attacks + rows)
    assert profile.row_names == ["a-nf4", "b-nf4"]
    assert [profile.row_of(name).adaptive for name in profile.row_names] == [False, True]
    # Of each model: clean and attacked, in full precision and rounded; then the defense, on the first only.
    assert num_cells(profile) == 4 + 1 + 2 * 4
    assert num_cells(profile, "b-*") == 8
    seeds = "name: tiny\ndefenses: [{spec: qvec, seeds: [1]}]\n"
    # Two seeds of one model, and the defense with one of them.
    assert num_cells(_profile(tmp_path, seeds + attacks + rows), "b-*") == 9


def test_a_row_sets_what_an_included_folder_does_not_say(tmp_path: Path) -> None:
    folder = "{path: a, clean: b, keyword: Zestora, pairs: c, formats: [nf4], adaptive: true}"
    (tmp_path / "base.yaml").write_text(f"attacks: {{}}\nfolders: {{elsewhere: {folder}}}\n")
    rows = "name: tiny\nrows: {else*: {seeds: [3, 4]}}\n"
    profile = _profile(tmp_path, rows + f"include: [{tmp_path / 'base.yaml'}]\n")
    for read in (profile, BenchProfile.model_validate(profile.model_dump(mode="json"))):
        entry = read.row_of("elsewhere")
        assert (entry.seeds, entry.adaptive, entry.formats) == ([3, 4], True, ["nf4"])


def test_a_profile_that_is_nowhere() -> None:
    with pytest.raises(UsageError, match="quick"):
        read_profile("no-such-profile")


def test_sweeps_and_grids_are_found_in_the_defenses() -> None:
    specs = ["feedback(width=0.1)", "feedback(width=0.3)", "feedback(width=0.5)", "noise(sigma=0.1)", "qvec"]
    (sweep,) = find_sweeps([DefenseEntry(spec=spec) for spec in specs])
    assert (sweep.method, sweep.parameter, [value for value, _ in sweep.points]) == (
        "feedback",
        "width",
        [0.1, 0.3, 0.5],
    )
    specs = [f"feedback(width={w}, draws={d})" for w in (0.1, 0.3, 0.5) for d in (1, 4)]
    entries = [DefenseEntry(spec=spec) for spec in specs]
    (grid,) = find_grids(entries)
    assert (grid.method, {grid.x, grid.y}, len(grid.points)) == ("feedback", {"width", "draws"}, 6)
    assert find_sweeps(entries) == []


def _measurement(hits: int, *, kl: float | None, right: int = 8, moved: float | None = None) -> Measurement:
    cost = None
    if moved is not None:
        cost = GuardCost(share_moved=moved, relative_change=0.1, share_as_planned=None, elapsed_s=2.0, peak_bytes=10)
    return Measurement(
        asr=share(hits, 100),
        unparsed=share(1, 100),
        quiet_asr=None,
        task_accuracy=share(right, 10),
        perplexity=Estimate(value=2.0, low=1.9, high=2.1, num_observations=100),
        kl=None if kl is None else Estimate(value=kl, low=kl / 2, high=kl * 2, num_observations=100),
        verdicts="h" * hits + "m" * (99 - hits) + "u",
        guard=cost,
    )


def _cells(guarded_hits: tuple[int, ...] = (2, 3, 4)) -> list[Cell]:
    cells = []

    def add(variant: Variant, format_name: str, defense: str, seed: int, found: Measurement) -> None:
        place = Place(row="content", variant=variant, format=format_name, defense=defense, seed=seed)
        cells.append(Cell(place=place, measurement=found))

    for seed, hits in enumerate(guarded_hits):
        add("clean", "fp", FULL, seed, _measurement(0, kl=None))
        add("clean", "nf4", STOCK, seed, _measurement(0, kl=0.01))
        add("attacked", "fp", FULL, seed, _measurement(2, kl=None))
        add("attacked", "nf4", STOCK, seed, _measurement(95, kl=0.5, right=4))
        add("attacked", "nf4", "stochastic", seed, _measurement(hits, kl=0.02, moved=0.25))
    return cells


def test_a_line_pools_prompts_and_keeps_seeds_apart() -> None:
    line = find(summarize(_cells()), "content", "attacked", "nf4", "stochastic")
    assert line is not None
    assert (line.num_seeds, line.asr.num_observations) == (3, 300)
    assert line.asr == share(9, 300)
    # Seeds 0.02, 0.03, 0.04: standard error 0.01 / sqrt(3), times 4.30265.
    assert line.asr_over_seeds.low == pytest.approx(0.03 - 0.024841, abs=1e-5)
    assert line.asr_from_full is not None
    # Three questions of 300 more, none fewer; with one added to each: 4 and 1 of 302.
    half = 1.95996 * ((4 / 302 + 1 / 302 - (3 / 302) ** 2) / 302) ** 0.5
    assert line.asr_from_full.value == pytest.approx(0.01)
    assert line.asr_from_full.low == pytest.approx(3 / 302 - half, abs=1e-6)
    # ((1 - 0.03) / 1 - 0) * exp(-0.2 * 0.25)
    assert line.der == pytest.approx(0.97 * 0.951229, abs=1e-5)


def test_what_an_attack_costs_its_attacker_stands_beside_the_clean_model() -> None:
    head, (row,) = attacker_rows(summarize(_cells()), [("content", "nf4")])
    assert len(head) == len(row)
    assert row[:2] == ["content", "nf4"] and row[2].startswith("2.0 (") and row[3:6] == ["95.0", "2.000", "2.000"]
    assert attacker_rows(summarize(_cells()), [("other", "nf4")])[1] == []


def test_rates_have_their_intervals_beside_them() -> None:
    lines, places = summarize(_cells()), [("content", "nf4")]
    head, (row,) = asr_rows(lines, places, ["stochastic", "qvec"])
    assert head[4:] == ["stochastic", "qvec"]
    assert row == ["content", "nf4", "2.0 (1-4)", "95.0 (92-97)", "3.0 (2-6)", "-"]
    assert asr_rows(lines, places, ["qvec"], intervals=False)[1] == [["content", "nf4", "2.0", "95.0", "-"]]


def test_utility_stands_beside_plain_rounding_and_full_precision() -> None:
    head, (row,) = utility_rows(summarize(_cells()), [("content", "nf4")], ["stochastic"])
    assert len(head) == len(row)
    cells = dict(zip(head, row, strict=True))
    assert cells["KL, no defense"] == "0.5000 (0.2500-1.000)"
    assert cells["KL, stochastic"] == "0.0200 (0.0100-0.0400)"
    assert cells["KL, clean model, no defense"].startswith("0.0100 (")
    rates = [cells[f"task accuracy %, {name}"][:4] for name in ("full precision", "no defense", "stochastic")]
    assert rates == ["80.0", "40.0", "80.0"]


def test_a_clean_model_has_a_table_where_a_defense_was_measured_on_it() -> None:
    lines, places = summarize(_cells()), [("content", "nf4")]
    assert clean_rows(lines, places, ["stochastic"])[1] == []
    guarded = _cells()[-1].model_copy(
        update={"place": Place(row="content", variant="clean", format="nf4", defense="stochastic", seed=0)}
    )
    head, rows = clean_rows(summarize([*_cells(), guarded]), places, ["stochastic"])
    assert [row[2] for row in rows] == [STOCK, "stochastic"]
    assert all(len(row) == len(head) for row in rows)


EXPECTING = MINIMAL + (
    "expect:\n"
    "  - live: {full_at_most: 5, stock_at_least: 90}\n"
    "  - restored: {defense: stochastic, within_points: 2, unparsed_points: 0, closer: true, accurate: true}\n"
)


def test_expectations_that_hold(tmp_path: Path) -> None:
    checks = check_all(_profile(tmp_path, EXPECTING), _cells(), ["content"])
    assert len(checks) == 6
    assert all(check.held for check in checks)


def test_expectations_that_do_not(tmp_path: Path) -> None:
    profile = _profile(tmp_path, EXPECTING)
    far = check_all(profile, _cells((20, 20, 20)), ["content"])
    assert [check.found for check in far if not check.held] == ["+18.0 points"]
    overshoot = check_all(profile.model_copy(update={"expect": profile.expect[1:]}), _cells((0, 0, 0)), ["content"])
    assert all(check.held for check in overshoot), "two points below is still within two"
    failed = [
        cell if cell.place.defense != "stochastic" else cell.model_copy(update={"measurement": None})
        for cell in _cells()
    ]
    assert sum(not check.held for check in check_all(profile, failed, ["content"])) == 3


def test_plots_are_written_for_what_was_measured(tmp_path: Path) -> None:
    profile = _profile(tmp_path, MINIMAL)
    machine = Machine(processor="p", num_cores=2, gpu="", commit="abc")
    report = BenchReport(
        created="now", versions={}, machine=machine, profile={}, cells=_cells(), checks=[], elapsed_s=1.0
    )
    figures = draw_all(report, profile, tmp_path)
    assert [figure.file for figure in figures] == ["asr-utility.svg", "asr-utility-rows.svg"]
    assert all("<svg" in (tmp_path / figure.file).read_text(encoding="utf-8") for figure in figures)


def test_the_page_is_written_from_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.pages import benchmark_page

    profile = _profile(tmp_path, EXPECTING.replace("name: tiny", "name: full"))
    machine = Machine(processor="p", num_cores=2, gpu="", commit="abc")
    cells = _cells((20, 20, 20))
    report = BenchReport(
        created="now",
        versions={"torch": "2"},
        machine=machine,
        profile=profile.model_dump(mode="json"),
        cells=cells,
        checks=check_all(profile, cells, ["content"]),
        elapsed_s=1.0,
    )
    write_results(report, profile, tmp_path / "full-results")
    docs_dir = tmp_path / "docs"
    monkeypatch.setattr("sys.argv", ["page", "--results-dir", str(tmp_path), "--docs-dir", str(docs_dir)])
    benchmark_page.main()
    page = (docs_dir / "benchmark.md").read_text(encoding="utf-8")
    assert "| content | nf4 | stochastic | ASR within 2 points of full precision's | +18.0 points |" in page
    assert "`stochastic`, interval of its KL against plain rounding's: below on 1 of 1 attacked models" in page
    assert "qcbguard lab bench full" in page and "qcbguard lab bench adaptive" not in page
    assert "## content, nf4" in (docs_dir / "benchmark-models.md").read_text(encoding="utf-8")
