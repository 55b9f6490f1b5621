"""Draws docs/figures/idea.svg, the picture of docs/idea.md: ``python docs/draw_idea.py``."""

from __future__ import annotations

from pathlib import Path

FIGURE = Path(__file__).with_name("figures") / "idea.svg"

#: A base perturbation [out, in]: what all examples share.
BASE = ((0.9, -0.3, 0.6, -0.8), (-0.5, 0.7, -0.9, 0.2), (0.3, -0.9, 0.4, 0.7))
#: Signs of three examples: r along the output axis, s along the input axis.
SIGNS = (((1, 1, -1), (1, -1, 1, 1)), ((-1, 1, 1), (1, 1, -1, 1)), ((1, -1, 1), (-1, 1, 1, -1)))

CELL, TOP = 26, 92
STYLE = """
  .paper { fill: #ffffff } .ink { fill: #1f2430 } .soft { fill: #59606e } .line { stroke: #9aa1ad; fill: none }
  .plus { fill: #2b6cb0 } .minus { fill: #c05621 }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #16181d } .ink { fill: #e8eaf0 } .soft { fill: #a7aebb } .line { stroke: #5d6572 }
    .plus { fill: #63b3ed } .minus { fill: #f6ad55 }
  }
  text { font-family: system-ui, sans-serif; font-size: 15px } .small { font-size: 13px }
  .sign { font-size: 14px; font-weight: 600 }
"""


def text(x: float, y: float, words: str, kind: str = "ink", anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def matrix(x: float, y: float, values: tuple[tuple[float, ...], ...]) -> list[str]:
    """Cells coloured by sign, the more opaque the larger, with the sign itself for those who do not tell the colours apart."""
    parts = []
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            left, top, kind = x + j * CELL, y + i * CELL, "plus" if value > 0 else "minus"
            parts.append(
                f'<rect x="{left:g}" y="{top:g}" width="{CELL - 2}" height="{CELL - 2}" class="{kind}" opacity="{abs(value)}"/>'
            )
            parts.append(text(left + CELL / 2 - 1, top + CELL / 2 + 4, "+" if value > 0 else "−", "ink sign"))
    parts.append(
        f'<rect x="{x - 3:g}" y="{y - 3:g}" width="{len(values[0]) * CELL + 4}" height="{len(values) * CELL + 4}" class="line"/>'
    )
    return parts


def signs(x: float, y: float, values: tuple[int, ...], down: bool) -> list[str]:
    return [
        text(x + k * CELL * (not down), y + k * CELL * down, *(("+", "plus sign") if v > 0 else ("−", "minus sign")))
        for k, v in enumerate(values)
    ]


def picture() -> str:
    width, height, wide = 860, 330, 4 * CELL
    parts = [f'<rect width="{width}" height="{height}" rx="10" class="paper"/>']
    parts += [text(150, 32, "one draw of noise a batch"), text(150, 54, "every example: the same ΔW", "soft small")]
    parts += matrix(98, TOP + 30, BASE)
    for n in range(3):
        parts += [
            f'<path d="M {150 + (n - 1) * 30} {TOP + 30 + 3 * CELL + 8} L {150 + (n - 1) * 70} {TOP + 158}" class="line"/>',
            text(150 + (n - 1) * 70, TOP + 178, f"x<tspan dy='4' class='small'>{n + 1}</tspan>"),
        ]
    parts += [text(150, 310, "one error in all, which stays", "soft small")]
    parts.append('<path d="M 300 24 V 306" class="line" stroke-dasharray="4 5"/>')
    parts += [
        text(580, 32, "flipout"),
        text(580, 54, "the same sizes, flipped by signs of each example's own: ΔW ∘ r sᵀ", "soft small"),
    ]
    for n, (r, s) in enumerate(SIGNS):
        x = 362 + n * 172
        flipped = tuple(tuple(r[i] * s[j] * value for j, value in enumerate(row)) for i, row in enumerate(BASE))
        parts += signs(x + CELL / 2 - 1, TOP + 22, s, down=False) + signs(x - 16, TOP + 30 + CELL / 2 + 4, r, down=True)
        parts += [text(x - 16, TOP + 6, f"r<tspan dy='4' class='small'>{n + 1}</tspan>", "soft small")]
        parts += [text(x + wide / 2, TOP + 2, f"s<tspan dy='4' class='small'>{n + 1}</tspan>", "soft small")]
        parts += matrix(x, TOP + 30, flipped)
        parts += [f'<path d="M {x + wide / 2:g} {TOP + 30 + 3 * CELL + 8} V {TOP + 158}" class="line"/>']
        parts += [text(x + wide / 2, TOP + 178, f"x<tspan dy='4' class='small'>{n + 1}</tspan>")]
    parts += [text(580, 310, "signs disagree, so errors cancel over the batch; sizes are still shared (γ)", "soft small")]
    title = "Shared noise and flipout: one perturbation for three examples, and the same one with rows and columns flipped for each"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"><title>{title}</title>'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    FIGURE.write_text(picture(), encoding="utf-8")
