"""Manifests of outer links that say little: the weights say the rest."""
import json

import pytest
import torch

from link import KINDS, OuterLink
from support.checkpoints import load_outer, save_outer

WIDTHS = {"outer_12": (6, 4), "outer_21": (4, 6)}


def saved(folder, kind, format, keep):
    """Two links of a kind, saved with a manifest whose entries keep only some of their columns."""
    links = {key: OuterLink(*widths, kind) for key, widths in WIDTHS.items()}
    save_outer(links, folder, format=format)
    path = folder / "outerlink_config.json"
    manifest = json.loads(path.read_text())
    manifest["adapters"] = [{**{name: entry[name] for name in keep}, "source": "a", "target": "b"}
                            for entry in manifest["adapters"]]
    path.write_text(json.dumps(manifest))
    return links


@pytest.mark.parametrize("keep", [("legacy_key", "filename"),
                                  ("legacy_key", "filename", "adapter_type"),
                                  ("legacy_key", "filename", "in_dim", "out_dim")])
@pytest.mark.parametrize("format", ["pt", "safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_kind_and_widths_from_the_weights(tmp_path, kind, format, keep):
    """Oracle: the links that were saved (in bfloat16, as .pt)."""
    links = saved(tmp_path, kind, format, keep)
    again = load_outer(tmp_path, WIDTHS)
    assert {key: (link.kind, link.widths) for key, link in again.items()} == {
        key: (kind, widths) for key, widths in WIDTHS.items()}
    for key, (src_width, _) in WIDTHS.items():
        x = torch.randn(3, src_width)
        assert torch.allclose(again[key](x), links[key](x), atol=0.1 if format == "pt" else 1e-6)


def test_links_for_other_models_are_still_one_line(tmp_path):
    saved(tmp_path, "2layer_ln_res", "pt", ("legacy_key", "filename"))
    with pytest.raises(ValueError, match="the links outer_12 6 -> 4, .* but this") as caught:
        load_outer(tmp_path, {"outer_12": (6, 5), "outer_21": (5, 6)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [
    lambda file: file.unlink(), lambda file: file.write_bytes(b"x"),
    lambda file: torch.save({"weight": torch.ones(2)}, file), lambda file: torch.save([1], file)])
def test_weights_that_say_nothing_are_one_line(tmp_path, damage):
    saved(tmp_path, "1layer", "pt", ("legacy_key", "filename"))
    damage(tmp_path / "outer_12.pt")
    with pytest.raises((ValueError, OSError)) as caught:
        load_outer(tmp_path, WIDTHS)
    assert "\n" not in str(caught.value)
