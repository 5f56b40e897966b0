"""What `timm-lfnsb push` publishes, in transformers: TimmWrapper gives the same logits, with the labels by name."""
from __future__ import annotations

import pytest
import skimage.data
import timm
import torch
from PIL import Image
from support.hub_server import Client, HubServer
from timm.models import save_for_hf

from timm_lfnsb.hub.push import staged

transformers = pytest.importorskip('transformers', reason="pip install 'timm-lfnsb[test]' brings transformers")

NAME = 'lfnsb.ferplus'
REPO = f'timm-lfnsb/{NAME}'


@pytest.fixture(scope='module')
def published():
    with staged(NAME, REPO) as folder:
        yield folder


@pytest.fixture(scope='module')
def face() -> Image.Image:
    return Image.fromarray(skimage.data.astronaut()[67:160, 177:270])


@pytest.fixture(scope='module')
def expected(face):
    """Input, logits and label names by timm and the embedded weights alone."""
    model = timm.create_model(NAME, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    images = transform(face).unsqueeze(0)
    with torch.no_grad():
        return images, model(images), list(model.pretrained_cfg['label_names'])


def test_same_logits_and_names(published, face, expected):
    images, logits, names = expected
    model, info = transformers.AutoModelForImageClassification.from_pretrained(published, output_loading_info=True)
    assert not any(info.values())
    assert model.config.id2label == dict(enumerate(names))
    assert model.config.label2id == {name: i for i, name in enumerate(names)}
    # Part of the file is half precision; the network still computes in full.
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    processor = transformers.AutoImageProcessor.from_pretrained(published)
    torch.testing.assert_close(processor(face, return_tensors='pt')['pixel_values'], images, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images).logits, logits, rtol=0, atol=0)


def test_embedding(published, expected):
    images, _, _ = expected
    model = transformers.AutoModel.from_pretrained(published).eval()
    reference = timm.create_model(NAME, pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images).pooler_output, reference(images), rtol=0, atol=0)


def test_pipeline(published, face, expected):
    _, logits, names = expected
    answers = transformers.pipeline('image-classification', model=str(published))(face, top_k=8)
    assert answers[0]['label'] == 'happiness'
    scores = dict(zip(names, logits.softmax(1)[0].tolist(), strict=True))
    assert {answer['label']: answer['score'] for answer in answers} == pytest.approx(scores, abs=1e-6)


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


def test_from_the_hub(published, face, expected, tmp_path):
    face.save(tmp_path / 'face.png')
    code = """
import timm_lfnsb
from transformers import pipeline
result = pipeline('image-classification', model=name)(face, top_k=8)
"""
    with HubServer() as server:
        server.add(REPO, published)
        with Client(server.url, tmp_path / 'home') as client:
            answers = client.run(code, name=REPO, face=str(tmp_path / 'face.png'))
    _, logits, names = expected
    scores = dict(zip(names, logits.softmax(1)[0].tolist(), strict=True))
    assert {answer['label']: answer['score'] for answer in answers} == pytest.approx(scores, abs=1e-6)
