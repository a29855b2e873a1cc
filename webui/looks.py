"""Colours, fonts and sizes of the page: a calm theme that fetches nothing."""

from typing import Any

import gradio as gr

CSS = """
.gradio-container { max-width: 1320px !important; margin: 0 auto !important; }
#title h1 { font-size: 1.5rem; font-weight: 650; margin: 0; }
#title p, #hint p { margin: 0.15rem 0 0; color: var(--body-text-color-subdued); }
#hint { font-size: 0.9rem; overflow-wrap: anywhere; }
#refresh { align-self: flex-end; height: 42px; margin-bottom: 10px; }
#status { font-family: var(--font-mono); font-size: 0.9rem; min-height: 2rem; }
#status p { margin: 0; overflow-wrap: anywhere; }
#cli textarea { font-family: var(--font-mono); font-size: 0.85rem; }

/* Pictures of any size fill their place: those of the small base are 64 px wide. */
#compare img { width: 100%; object-fit: contain; image-rendering: auto; }
#picture button, #picture .image-frame, #picture img { width: 100%; height: auto; }
#picture img { object-fit: contain; image-rendering: auto; }

/* The strip is as high as its pictures, and its captions stand below them. */
#strip .grid-wrap { min-height: 0; height: auto; max-height: none; }
#strip .grid-container { grid-template-columns: repeat(auto-fill, minmax(92px, 1fr)); padding-top: 2.4rem; }
#strip .gallery-item, #strip .thumbnail-item { height: auto; aspect-ratio: auto; }
#strip .thumbnail-item img { width: 100%; height: auto; image-rendering: auto; }
#strip .caption-label { position: static; max-width: none; width: 100%; border: 0; border-radius: 0; box-shadow: none; text-align: center; }

@media (min-width: 761px) {
  #columns > .column:first-child { position: sticky; top: 1rem; align-self: flex-start; }
}
@media (max-width: 760px) {
  #columns { flex-direction: column; }
  #columns > .column { width: 100%; min-width: 0 !important; }
}
"""


def theme() -> Any:
    """Slate and teal, in the fonts that the system has."""
    sans, mono = ["ui-sans-serif", "system-ui", "sans-serif"], ["ui-monospace", "Consolas", "monospace"]
    soft = gr.themes.Soft(primary_hue="teal", neutral_hue="slate", radius_size="md", font=sans, font_mono=mono)
    colours = {
        "block_title_background_fill": "none",
        "block_title_text_color": "*body_text_color",
        "block_label_background_fill": "*background_fill_primary",
        "block_label_text_color": "*body_text_color",
        "button_primary_background_fill": "*primary_600",
        "button_primary_background_fill_hover": "*primary_700",
        "button_primary_text_color": "white",
    }
    dark = {f"{name}_dark": colour for name, colour in colours.items()}
    paper = {"body_background_fill": "*neutral_50", "body_background_fill_dark": "*neutral_950"}
    return soft.set(**paper, **colours, **dark, block_title_padding="0", block_title_text_weight="500", block_label_text_weight="500")
