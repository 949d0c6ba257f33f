"""Draws the pictures of the stages beside this file: `python docs/images/draw.py`.

What is live when comes from the schedules themselves, parameters from the plan; a test draws them again and compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from progscale.plan import plan_for
from progscale.schedule import EmbeddingsPolicy, Stage, build_stages

HERE = Path(__file__).resolve().parent
# One grey that can be read on white and on black: a picture in a page does not know the page's scheme.
TEXT, ALWAYS, LIVE, FROZEN, ON_FROZEN = "#7d8590", "#1a7f37", "#2f81f7", "#d0d7de", "#57606a"
BACKWARD = "#d4622a"
BLOCKS, STAGES = 12, 3


class Picture:
    """An SVG that is put together shape by shape; all lengths in pixels."""

    def __init__(self, width: int, height: int, label: str) -> None:
        self.width, self.height, self.label = width, height, label
        self.shapes: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """A filled rectangle."""
        self.shapes.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{colour}"/>')

    def text(
        self, x: float, y: float, text: str, *, size: float = 12, colour: str = TEXT, bold: bool = False, anchor: str = "start"
    ) -> None:
        """A line of text whose base line is at `y`."""
        weight = 600 if bold else 400
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" font-weight="{weight}" fill="{colour}">'
            f"{escape(text)}</text>"
        )

    def part(self, x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
        """A part of the model with its name."""
        self.box(x, y, width, height, colour)
        ink = ON_FROZEN if colour == FROZEN else "#ffffff"
        self.text(x + width / 2, y + height / 2 + 5, text, colour=ink, anchor="middle")

    def arrow(self, from_x: float, to_x: float, y: float, colour: str) -> None:
        """A horizontal arrow that ends at `to_x`."""
        tip = 6 if to_x < from_x else -6
        self.shapes.append(
            f'<path d="M{from_x:g} {y:g}H{to_x + tip:g}" stroke="{colour}" stroke-width="2" fill="none"/>'
            f'<path d="M{to_x:g} {y:g}l{tip:g} -4v8z" fill="{colour}"/>'
        )

    def line(self, from_x: float, from_y: float, to_x: float, to_y: float, *, dashed: bool = False) -> None:
        """A thin grey line."""
        dash = ' stroke-dasharray="4 4"' if dashed else ""
        self.shapes.append(f'<path d="M{from_x:g} {from_y:g}L{to_x:g} {to_y:g}" stroke="{TEXT}" fill="none"{dash}/>')

    def __str__(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'font-family="system-ui,sans-serif" role="img" aria-label={quoteattr(self.label)}>'
        )
        return "\n".join([head, *self.shapes, "</svg>"]) + "\n"


def stages_of(
    name: str, embeddings: EmbeddingsPolicy = "always", options: Mapping[str, object] | None = None
) -> tuple[Stage, ...]:
    """The stages of a schedule on twelve blocks."""
    return build_stages(
        name, num_blocks={"blocks": BLOCKS}, stages=STAGES, total_steps=300, embeddings=embeddings, options=options
    )


def stages() -> Picture:
    """Progtuning on BERT-base, with the parameters that each stage updates."""
    picture = Picture(760, 250, "Three stages train fewer and fewer blocks of a 12-block encoder")
    plan = plan_for("bert-base-uncased", epochs=STAGES)
    picture.text(
        20, 26, f"BERT-base, {BLOCKS} blocks (0 to {BLOCKS - 1}), {STAGES} epochs in {STAGES} stages", size=15, bold=True
    )
    total = 0.0
    for row, (stage, planned) in enumerate(zip(stages_of("progtuning"), plan.stages, strict=True)):
        y = 50 + 56 * row
        total += float(planned.updated_parameters)
        picture.text(20, y + 25, f"stage {stage.index}", size=13, bold=True)
        picture.part(86, y, 88, 38, "embeddings", ALWAYS)
        for block in range(BLOCKS):
            picture.part(184 + 33 * block, y, 29, 38, str(block), LIVE if stage.is_live("blocks", block) else FROZEN)
        picture.part(584, y, 52, 38, "head", ALWAYS)
        picture.text(650, y + 25, f"{float(planned.updated_parameters) / 1e6:.1f} M", size=13, bold=True)
    picture.box(160, 222, 16, 18, FROZEN)
    picture.text(184, 236, "frozen: no gradient, no optimizer state, bits proven unchanged")
    picture.text(650, 236, f"{total / 1e6:.1f} M in all", bold=True)
    return picture


# Every schedule that is shipped, with options for a picture, and what it is in a few words.
SCHEDULES: dict[str, tuple[dict[str, object], str]] = {
    "none": ({}, "plain fine-tuning"),
    "progtuning": ({}, "the paper's: the lower parts freeze one after the other"),
    "weighted": ({"block_weights": [1] * 8 + [3] * 4}, "parts of equal weight; here the four highest blocks count three times"),
    "custom": ({"first_blocks": [0, 2, 8]}, "your list of first blocks; here [0, 2, 8]"),
    "growing": ({}, "progtuning backwards"),
    "without_low_blocks": ({}, "each stage without its lowest part"),
    "only": ({"blocks": [3]}, "listed blocks alone; here [3]"),
}


def schedules() -> Picture:
    """All schedules, with the same model and number of stages."""
    height = 78
    picture = Picture(760, 40 + height * len(SCHEDULES), "Which blocks each schedule trains in each of three stages")
    picture.text(210, 22, "stage 1", bold=True)
    picture.text(395, 22, "stage 2", bold=True)
    picture.text(580, 22, "stage 3", bold=True)
    for row, (name, (options, words)) in enumerate(SCHEDULES.items()):
        y = 40 + height * row
        picture.text(20, y + 18, name, size=14, bold=True)
        picture.text(210, y + 46, words)
        for stage in stages_of(name, options=options):
            x = 210 + 185 * (stage.index - 1)
            for block in range(BLOCKS):
                picture.box(x + 14 * block, y, 12, 26, LIVE if stage.is_live("blocks", block) else FROZEN)
    return picture


POLICIES: dict[EmbeddingsPolicy, str] = {
    "always": "the paper: the backward pass runs to the bottom in every stage",
    "first_stage": "frozen from stage 2 on: it ends at the lowest trained block",
    "never": "frozen throughout",
}


def embeddings() -> Picture:
    """The three policies for the embeddings: how far down the backward pass runs."""
    picture = Picture(760, 460, "How far down the backward pass runs, by embeddings policy and stage")
    for group, (policy, words) in enumerate(POLICIES.items()):
        top = 20 + 150 * group
        picture.text(20, top, f"schedule.embeddings={policy}", size=14, bold=True)
        picture.text(310, top, words)
        for stage in stages_of("progtuning", embeddings=policy):
            y = top + 12 + 40 * (stage.index - 1)
            lowest = min(stage.live_blocks["blocks"])
            picture.text(20, y + 15, f"stage {stage.index}")
            picture.part(86, y, 88, 20, "embeddings", ALWAYS if stage.embeddings else FROZEN)
            for block in range(BLOCKS):
                live = stage.is_live("blocks", block)
                picture.part(184 + 33 * block, y, 29, 20, str(block), LIVE if live else FROZEN)
            picture.part(584, y, 52, 20, "head", ALWAYS)
            picture.arrow(636, 86 if stage.embeddings else 184 + 33 * lowest, y + 28, BACKWARD)
            picture.text(648, y + 32, "backward", colour=BACKWARD)
    return picture


def switch() -> Picture:
    """What a stage switch takes along."""
    picture = Picture(760, 300, "A stage switch: what is rebuilt, what is carried over, what is proven")
    columns = ((20, "stage 1"), (300, "the switch"), (560, "stage 2"))
    for x, title in columns:
        picture.text(x, 26, title, size=15, bold=True)
    rows = ("embeddings, head", "blocks 4 to 11", "blocks 0 to 3")
    for row, name in enumerate(rows):
        y = 46 + 76 * row
        freezes = row == 2
        picture.part(20, y, 150, 26, name, ALWAYS if row == 0 else LIVE)
        picture.text(20, y + 44, "weights, moments, step count")
        picture.arrow(200, 290, y + 13, TEXT)
        if freezes:
            picture.text(300, y + 6, "weights stay where they are,")
            picture.text(300, y + 22, "moments are let go,")
            picture.text(300, y + 38, "the bits are hashed")
        else:
            picture.text(300, y + 6, "weights, moments, step count")
            picture.text(300, y + 22, "carried over, bit for bit,")
            picture.text(300, y + 38, "into new param groups and engine")
        picture.arrow(500, 550, y + 13, TEXT)
        picture.part(560, y, 150, 26, name, FROZEN if freezes else ALWAYS if row == 0 else LIVE)
        picture.text(560, y + 44, "hashed again at its end" if freezes else "goes on as if nothing had been")
    picture.line(20, 266, 740, 266, dashed=True)
    picture.text(
        20,
        288,
        "The data order, the learning rate and the loss scale go on too. With nothing to freeze, a switch changes no bit.",
    )
    return picture


PICTURES = {"stages": stages, "schedules": schedules, "embeddings": embeddings, "switch": switch}


def main() -> None:
    """Writes all of them."""
    for name, draw in PICTURES.items():
        (HERE / f"{name}.svg").write_text(str(draw()), encoding="utf-8")


if __name__ == "__main__":
    main()
