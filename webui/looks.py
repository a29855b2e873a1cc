"""Colours and fonts of the page: a calm theme that fetches nothing; what it does not say is in `page.css`."""

from typing import Any

import gradio as gr


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
    colours |= {"input_placeholder_color": "*neutral_500", "block_info_text_color": "*neutral_500"}
    dark |= {"input_placeholder_color_dark": "*neutral_400", "block_info_text_color_dark": "*neutral_300"}
    paper = {"body_background_fill": "*neutral_50", "body_background_fill_dark": "*neutral_950"}
    return soft.set(**paper, **colours, **dark, block_title_padding="0", block_title_text_weight="500", block_label_text_weight="500")
