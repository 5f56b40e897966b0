"""What `timm-lfnsb push` publishes, in transformers: TimmWrapper gives the same logits, with the labels by name."""
from __future__ import annotations

import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from timm_lfnsb.checkpoints.pack import write_folder
from timm_lfnsb.hub.push import staged

transformers = pytest.importorskip('transformers', reason="pip install 'timm-lfnsb[test]' brings transformers")

NAME = 'lfnsb.ferplus'


def test_published_weights_are_those_of_timm():
    face = Image.effect_noise((93, 93), 60).convert('RGB')
    own = timm.create_model(NAME, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(own), is_training=False)
    images, names = transform(face).unsqueeze(0), list(own.pretrained_cfg['label_names'])
    with staged(NAME, f'timm-lfnsb/{NAME}') as folder:
        model, info = transformers.AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
        backbone = transformers.AutoModel.from_pretrained(folder).eval()
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert not any(info.values())
    assert model.config.id2label == dict(enumerate(names))
    # Part of the file is half precision; the network still computes in full.
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(processor(face, return_tensors='pt')['pixel_values'], images, rtol=0, atol=0)
    embedding = timm.create_model(NAME, pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images).logits, own(images), rtol=0, atol=0)
        torch.testing.assert_close(backbone(images).pooler_output, embedding(images), rtol=0, atol=0)


@pytest.mark.parametrize('name, labels, kwargs', [
    ('mobilefacenet', ('yes', 'no', 'perhaps'), dict(num_classes=3, in_chans=1, img_size=48)),
    ('lfnsb', (), dict(num_classes=0))])
def test_folders_that_pack_and_convert_write(name, labels, kwargs, tmp_path):
    model = timm.create_model(name, **kwargs).eval()
    write_folder(model, tmp_path / 'out', labels, kwargs)
    kind = transformers.AutoModelForImageClassification if labels else transformers.AutoModel
    wrapped, info = kind.from_pretrained(tmp_path / 'out', output_loading_info=True)
    assert not any(info.values())
    images = torch.randn(2, kwargs.get('in_chans', 3), *2 * [kwargs.get('img_size', 64)])
    with torch.no_grad():
        answer = wrapped.eval()(images)
        torch.testing.assert_close(answer.logits if labels else answer.pooler_output, model(images), rtol=0, atol=0)
    assert not labels or wrapped.config.id2label == dict(enumerate(labels))


@pytest.mark.parametrize('name, kwargs', [('lfn_small.affectnet7', dict(img_size=96)), ('mfn.rafdb', dict(in_chans=1))])
def test_networks_of_fixed_size(name, kwargs, tmp_path):
    """Arguments of the network are in config.json, and go through both libraries."""
    torch.manual_seed(2)
    model = timm.create_model(name, **kwargs).eval()
    save_for_hf(model, tmp_path / 'own', safe_serialization=True)
    (tmp_path / 'own' / 'README.md').write_text('---\nlicense: mit\n---\n')
    size = kwargs.get('img_size', 112)
    images = torch.randn(2, kwargs.get('in_chans', 3), size, size)
    with staged(str(tmp_path / 'own'), 'me/own') as folder:
        wrapped = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
        again = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(wrapped(images).logits, model(images), rtol=0, atol=0)
        torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)
