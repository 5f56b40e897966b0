"""The temperature of weights: where it comes from, and who sees it."""
from __future__ import annotations

import json

import pytest
import timm
from timm.models import save_for_hf

from timm_lfnsb.errors import UserError
from timm_lfnsb.labels import EXPRESSIONS_8
from timm_lfnsb.models import loading
from timm_lfnsb.models.loading import load_model
from timm_lfnsb.models.temperature import model_temperature
from timm_lfnsb.weights.names import weights_info


@pytest.mark.parametrize('name', ['lfnsb', 'lfn_small.ferplus'])
def test_embedded_weights_have_that_of_their_json(name, monkeypatch):
    info = weights_info(f"{name.split('.')[0]}.ferplus")
    assert model_temperature(load_model(name, inference=True)) == info['temperature']
    monkeypatch.setattr(loading, 'weights_info', lambda _: {**info, 'temperature': 0.7})
    assert model_temperature(load_model(name, inference=True)) == 0.7
    assert model_temperature(timm.create_model(name, pretrained=True)) is None  # timm's own models give plain logits


@pytest.mark.parametrize('value, expected', [(0.8, 0.8), (2, 2.), (None, None)])
def test_folders_have_that_of_their_config(value, expected, tmp_path):
    """A network with the embedded weights' name and tag is not those weights."""
    model = timm.create_model('lfnsb.ferplus')
    save_for_hf(
        model, tmp_path, model_config={'softmax_temperature': value} if value else None, safe_serialization=True)
    assert model_temperature(load_model(f'local-dir:{tmp_path}')) == expected


@pytest.mark.parametrize('value', ['0.8', 0, -1, float('inf'), True])
def test_what_is_no_temperature_is_refused(value, tmp_path):
    save_for_hf(timm.create_model('test_resnet', num_classes=8), tmp_path, safe_serialization=True,
                model_config={'softmax_temperature': value, 'label_names': list(EXPRESSIONS_8)})
    with pytest.raises(UserError, match=f'softmax_temperature of local-dir:{tmp_path} is .*, no positive number'):
        load_model(f'local-dir:{tmp_path}')


def test_transformers_reads_the_config_and_keeps_it(tmp_path):
    """It would drop an entry `temperature`."""
    transformers = pytest.importorskip('transformers', reason="pip install 'timm-lfnsb[test]' brings transformers")
    save_for_hf(timm.create_model('test_resnet', num_classes=8), tmp_path, safe_serialization=True,
                model_config={'softmax_temperature': 0.8, 'label_names': list(EXPRESSIONS_8)})
    config = json.loads((tmp_path / 'config.json').read_text())
    config['num_classes'] = config['model_args'].pop('num_classes')
    (tmp_path / 'config.json').write_text(json.dumps(config))
    transformers.AutoModelForImageClassification.from_pretrained(tmp_path).save_pretrained(tmp_path / 'again')
    assert model_temperature(load_model(f'local-dir:{tmp_path / "again"}')) == 0.8
