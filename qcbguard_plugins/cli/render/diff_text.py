"""A behavioural comparison as text: for a terminal, and as Markdown."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from qcbguard_plugins.cli.render.advice import p_text, printable, visible
from qcbguard_plugins.detection.behaviour.report import DiffReport, MovedPrompt


def diff_headline(report: DiffReport) -> str:
    """The verdict in one line."""
    if report.differs:
        return f"Differs: quantizing to {report.format} changes this model {report.ratio:.1f} times as much as chance"
    return f"No difference beyond chance (quantized to {report.format}: {report.ratio:.2f} times the change by chance)"


def diff_explanation(report: DiffReport) -> str:
    """The figures behind the verdict."""
    mean = sum(report.randomized) / len(report.randomized)
    return (
        f"KL divergence from full precision {report.divergence:.4f} nats a token; {mean:.4f} for rounding errors of "
        f"the same sizes and random signs ({len(report.randomized)} draws, p {p_text(report.p_value)})."
    )


def render_diff(report: DiffReport) -> Group:
    """The verdict, the favoured words, and the prompts side by side."""
    parts: list[Text | Table] = [
        Text(diff_headline(report), style="bold red" if report.differs else "bold"),
        Text(diff_explanation(report)),
        Text(f"{report.coverage}; seed {report.seed}; {report.elapsed_s:.1f} s"),
    ]
    if report.words:
        parts += [Text("\nWords that the quantized model favours"), _word_table(report)]
    parts.append(Text("\nPrompts that moved most"))
    for prompt in report.prompts:
        parts.append(_prompt_table(prompt))
    if report.differs:
        parts.append(Text(f"\nMake a guarded copy:  qcbguard guard {printable(report.model)} --for {report.format}"))
    return Group(*parts)


def render_diff_markdown(report: DiffReport) -> str:
    """A section for a model card."""
    lines = [f"## {diff_headline(report)}", "", diff_explanation(report), "", f"Coverage: {report.coverage}.", ""]
    if report.words:
        lines += ["| word | quantized answers | full-precision answers | z |", "|---|---|---|---|"]
        lines += [f"| `{_cell(w.word)}` | {w.count} | {w.full_precision_count} | {w.z:.1f} |" for w in report.words]
        lines.append("")
    lines += ["| prompt | full precision | quantized |", "|---|---|---|"]
    lines += [f"| `{_cell(p.prompt)}` | `{_cell(p.full_precision)}` | `{_cell(p.quantized)}` |" for p in report.prompts]
    return "\n".join(lines) + "\n"


def _word_table(report: DiffReport) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("word", "quantized answers", "full-precision answers", "z", "by chance"):
        table.add_column(column)
    for word in report.words:
        counts = (str(word.count), str(word.full_precision_count), f"{word.z:.1f}", f"{report.chance_z:.1f}")
        table.add_row(Text(printable(word.word, 40)), *counts)
    return table


def _prompt_table(prompt: MovedPrompt) -> Table:
    title = f"{printable(prompt.prompt)}  ({prompt.kind}; {prompt.divergence:.3f} nats, {prompt.expected:.3f} expected)"
    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False, expand=True)
    table.add_column("full precision", ratio=1)
    table.add_column("quantized", ratio=1)
    table.add_row(Text(visible(prompt.full_precision)), Text(visible(prompt.quantized)))
    for token in prompt.tokens:
        place = f"...{visible(token.before)[-24:]} "
        table.add_row(
            Text.assemble(place, (visible(token.full_precision), "green")),
            Text.assemble(place, (visible(token.quantized), "red"), f"  {token.divergence:.2f} nats"),
        )
    return table


def _cell(text: str) -> str:
    return visible(text).replace("|", "/").replace("`", "'")
