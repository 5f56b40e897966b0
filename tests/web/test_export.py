"""The page for browsers: what is written, and what Chromium makes of it on a loopback server without other network."""
from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import json
import os
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from timm_lfnsb import ExpressionRecognizer
from timm_lfnsb.cli import main
from timm_lfnsb.data.images import sample_picture
from timm_lfnsb.errors import UserError
from timm_lfnsb.models.loading import load_model
from timm_lfnsb.predict.faces import YUNET, YuNetDetector, crop_upright
from timm_lfnsb.web.export import CDN, RUNTIME, export_web

onnxruntime = pytest.importorskip('onnxruntime', reason="pip install 'timm-lfnsb[export]' to test exports")

NAMES = ['<b>calm</b>', 'joy', 'grief']
FILES = {'app.js', 'classifier.onnx', 'config.json', 'detector.LICENSE.txt', 'detector.onnx', 'faces.js', 'index.html',
         'style.css'}


def tiny(in_chans: int = 3, **config) -> nn.Module:
    """One of timm's own small models for tests."""
    model = timm.create_model('test_resnet', num_classes=len(NAMES), in_chans=in_chans).eval()
    nn.init.normal_(model.get_classifier().weight)
    model.pretrained_cfg = dict(
        model.pretrained_cfg, input_size=(in_chans, 64, 64), label_names=NAMES, crop_pct=1, **config)
    return model


def run(file: Path, **inputs: np.ndarray) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider']).run(None, inputs)


@pytest.mark.parametrize('in_chans, config', [
    (3, dict(interpolation='bilinear')),
    (3, dict(interpolation='bicubic', crop_pct=0.85)),
    (1, dict(interpolation='bicubic', crop_pct=0.9, mean=(0.4,), std=(0.2,))),
])
def test_classifier_prepares_crops_as_timm_does(in_chans, config, tmp_path):
    model = tiny(in_chans)
    model.pretrained_cfg.update(config)
    model.softmax_temperature = 0.6
    export_web(model, tmp_path / 'page')
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    portrait = Image.open(sample_picture())
    for side in (20, 64, 75, 301):
        crop = portrait.crop((150, 50, 150 + side, 50 + side))
        with torch.no_grad():
            expected = model(transform(crop.convert('RGB' if in_chans == 3 else 'L'))[None]).div(0.6).softmax(1).numpy()
        [got] = run(tmp_path / 'page' / 'classifier.onnx', pixels=np.array(crop.convert('RGBA')))
        np.testing.assert_allclose(got, expected, atol=1e-3)
        assert np.ptp(expected) > 0.1  # else anything would agree


def test_page(tmp_path):
    """Its files, with ONNX Runtime from the CDN or its own; the detector takes any size; names are escaped."""
    model = tiny(architecture='a<i>')
    npm = tmp_path / 'npm'
    (npm / 'dist').mkdir(parents=True)
    for name in RUNTIME:
        (npm / 'dist' / name).write_text(f'{name} of another version')
    (tmp_path / 'remote').mkdir()  # an empty folder is taken
    export_web(model, tmp_path / 'remote')
    report = export_web(model, tmp_path / 'new' / 'own', npm / 'dist')
    export_web(model, tmp_path / 'again', npm)
    assert report.path == tmp_path / 'new' / 'own' / 'classifier.onnx' and report.agreement == 1
    assert not [path for path in tmp_path.rglob('.*')]
    for folder in ('remote', 'new/own', 'again'):
        page = tmp_path / folder
        html, config = (page / 'index.html').read_text(), json.loads((page / 'config.json').read_text())
        assert config['label_names'] == NAMES and 'Model a&lt;i&gt;' in html and '{{' not in html and '{%' not in html
        own = folder != 'remote'
        assert {path.name for path in page.iterdir()} == (FILES | set(RUNTIME) if own else FILES)
        assert (f"connect-src 'self' {CDN};" in html) != own and html.count('https://') == (not own)
        for name, file in zip(RUNTIME, config['runtime'], strict=True):
            digest = hashlib.sha384(f'{name} of another version'.encode()).digest()
            assert file == (dict(url=f'./{name}', integrity=f'sha384-{base64.b64encode(digest).decode()}') if own else
                            dict(url=CDN + name, integrity=RUNTIME[name]))
    pixels = np.random.default_rng(0).integers(0, 256, (640, 640, 4), np.uint8)
    original = run(YUNET, input=pixels[None, :, :, 2::-1].transpose(0, 3, 1, 2).astype(np.float32))
    for got, expected in zip(run(page / 'detector.onnx', pixels=pixels), original, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    assert [len(found[0]) for found in run(page / 'detector.onnx', pixels=pixels[:96, :320])[:3]] == [480, 120, 30]


@pytest.mark.parametrize('change, message', [
    (dict(label_names=None), 'no label_names'),
    (dict(input_size=(3, 64, 96)), r'square inputs of 1 or 3 channels.*\(3, 64, 96\)'),
    (dict(interpolation='lanczos'), r'resized by bilinear or bicubic, .* lanczos'),
    (dict(out='page.onnx'), 'named like a file'), (dict(out='full'), 'full is there already'),
    (dict(out='full/file'), 'file is there already'),
    (dict(runtime_dir='full'), 'full does not have ort.wasm.bundle.min.mjs and .*npm pack'),
    (dict(precision='int8'), '--calibrate'),
])
def test_refused_and_nothing_written(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('full').mkdir()
    Path('full/file').touch()
    model = tiny()
    arguments = {key: change[key] for key in ('out', 'runtime_dir', 'precision') if key in change}
    model.pretrained_cfg.update({key: value for key, value in change.items() if key not in arguments})
    with pytest.raises(UserError, match=message):
        export_web(model, **dict(dict(out='page'), **arguments))
    assert sorted(tmp_path.rglob('*')) == [tmp_path / 'full', tmp_path / 'full' / 'file']


def test_command(tmp_path):
    def invoke(*arguments: str):
        return CliRunner().invoke(main, ['export', 'lfnsb', str(tmp_path / 'page'), *arguments])

    for arguments, message in (
            (('--runtime-dir', str(tmp_path)), '--runtime-dir is for --format web'),
            (('--format', 'web', '--batch', 'dynamic'), 'takes no --batch'),
            (('--format', 'web', '--with-preprocess'), 'no --with-preprocess'),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2 and message in result.output
    result = invoke()
    assert result.exit_code == 1 and 'give --format web' in result.output
    result = invoke('--format', 'web', '--precision', 'fp16')
    assert result.exit_code == 0 and 'fp16, 6.1 MB' in result.output and (tmp_path / 'page' / 'index.html').is_file()


# From here on Chromium.

@pytest.fixture(scope='module')
def npm() -> Path:
    folder = os.environ.get('TIMM_LFNSB_ORT_WEB')
    if not folder:
        pytest.skip('set TIMM_LFNSB_ORT_WEB to the unpacked npm package onnxruntime-web (npm pack onnxruntime-web)')
    return Path(folder)


@pytest.fixture(scope='module')
def launch(tmp_path_factory):
    """A function that starts Chromium, whose camera films the portrait, and gives a page of a folder served here."""
    sync_api = pytest.importorskip('playwright.sync_api', reason='pip install playwright to test the page')
    chromium = os.environ.get('TIMM_LFNSB_CHROMIUM') or shutil.which('chromium')
    if not chromium:
        pytest.skip('apt-get install chromium, or set TIMM_LFNSB_CHROMIUM to a Chromium or Chrome, to test the page')
    video = tmp_path_factory.mktemp('video') / 'portrait.y4m'
    frame = cv2.cvtColor(cv2.imread(str(sample_picture()))[:480], cv2.COLOR_BGR2YUV_I420).tobytes()
    video.write_bytes(b'YUV4MPEG2 W512 H480 F10:1 Ip A1:1 C420jpeg\n' + 3 * (b'FRAME\n' + frame))
    servers = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=[
            '--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream',
            f'--use-file-for-fake-video-capture={video}'])

        def open_page(folder: Path, routes=(), **options):
            handler = functools.partial(Quiet, directory=str(folder))
            servers.append(http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler))
            threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
            host = f'http://127.0.0.1:{servers[-1].server_port}/'
            context = browser.new_context(**options)
            page, requests, errors = context.new_page(), [], []
            page.set_default_timeout(120_000)
            page.on('request', lambda request: requests.append((request.method, request.url)))
            page.on('pageerror', lambda error: errors.append(str(error)))
            page.route(lambda url: not url.startswith((host, 'data:', 'blob:')), lambda route: route.abort())
            for pattern, answer in routes:
                page.route(pattern, answer)
            page.goto(host)
            status = page.locator('#status')

            def says(pattern: str) -> str:
                sync_api.expect(status).to_have_text(re.compile(pattern), timeout=120_000)
                return status.inner_text()

            return SimpleNamespace(
                page=page, context=context, says=says, requests=requests, errors=errors, host=host)

        yield open_page
        browser.close()
    for server in servers:
        server.shutdown()


@pytest.fixture(scope='module')
def site(npm, launch, tmp_path_factory):
    """The page of `lfnsb` without any network once it is loaded, at a phone's width."""
    folder = tmp_path_factory.mktemp('site') / 'page'
    export_web(load_model('lfnsb'), folder, npm)
    site = launch(folder, viewport={'width': 390, 'height': 844}, color_scheme='dark')
    site.says('^Ready')
    site.page.evaluate('''async () => {
        window.faces = await import(new URL('faces.js', document.baseURI));
        window.recognizer = await faces.Recognizer.load();
    }''')
    site.loaded = len(site.requests)
    site.context.set_offline(True)
    yield site
    assert site.errors == []
    assert {method for method, _ in site.requests} == {'GET'} and len(site.requests) == site.loaded
    assert all(url.startswith((site.host, 'data:')) for _, url in site.requests)


def _integrity(file: Path) -> str:
    return f'sha384-{base64.b64encode(hashlib.sha384(file.read_bytes()).digest()).decode()}'


def cards(site) -> list[tuple[str, list[str]]]:
    """Heading and rows of each face."""
    return [(card.locator('h2').inner_text(), card.locator('tr').all_inner_texts())
            for card in site.page.locator('#faces > li').all()]


@pytest.mark.slow
def test_integrity_of_the_pinned_files(npm):
    version = json.loads((npm / 'package.json').read_text())['version']
    if f'@{version}/' not in CDN:
        pytest.skip(f'TIMM_LFNSB_ORT_WEB has version {version}, the page names {CDN}')
    for name, integrity in RUNTIME.items():
        assert integrity == _integrity(npm / 'dist' / name)


@pytest.mark.slow
def test_portrait_as_in_python(site):
    [expected] = ExpressionRecognizer()(sample_picture())
    site.page.set_input_files('#file', sample_picture())
    assert site.says('^astronaut.png') == f'astronaut.png: 1 face: {expected.label}.'
    [(heading, rows)] = cards(site)
    assert heading == f'1 {expected.label}'
    assert [row.split('\t')[0] for row in rows] == list(expected.probabilities)
    shown = [int(row.split('\t')[-1].removesuffix(' %')) / 100 for row in rows]
    np.testing.assert_allclose(shown, list(expected.probabilities.values()), atol=0.05)
    assert re.fullmatch(r'\d+ ms for this picture: .*', site.page.locator('#time').inner_text())
    # The box as it lies on the picture on the screen.
    view, box = (site.page.locator(selector).bounding_box() for selector in ('#view', '.box'))
    scale = 512 / view['width']
    x, y, width, height = (
        scale * value for value in (box['x'] - view['x'], box['y'] - view['y'], box['width'], box['height']))
    left, top, wide, high = expected.box
    common = (min(x + width, left + wide) - max(x, left)) * (min(y + height, top + high) - max(y, top))
    assert common / (width * height + wide * high - common) > 0.8
    # Readable by a screen reader, and on a phone: nothing sticks out.
    assert site.page.get_by_role('img', name=f'The picture: 1 face: {expected.label}.').count() == 1
    assert site.page.get_by_role('row', name=f'{expected.label} {round(100 * expected.score)} %').count() == 1
    assert site.page.evaluate('document.documentElement.scrollWidth') <= 390


@pytest.mark.slow
@pytest.mark.parametrize('tilt, shift', [(0, 0), (25, 0), (-15, -190)])
def test_same_crop(site, tilt, shift):
    """Also of a tilted face, and of one at the border of the picture."""
    portrait = cv2.cvtColor(cv2.imread(str(sample_picture())), cv2.COLOR_BGR2RGB)
    matrix = cv2.getRotationMatrix2D((224, 118), tilt, 1)
    matrix[:, 2] += shift, shift / 3
    image = cv2.warpAffine(portrait, matrix, (512, 512), borderMode=cv2.BORDER_REPLICATE)
    face = YuNetDetector(turn=False)(image)[0]
    crop = crop_upright(image, face.box, face.points)
    found, pixels, side, given = site.page.evaluate('''async ([data, box, points, crop, size]) => {
        const bytes = (text) => Uint8ClampedArray.from(atob(text), (c) => c.charCodeAt(0));
        const picture = Object.assign(document.createElement('canvas'), { width: 512, height: 512 });
        picture.getContext('2d').putImageData(new ImageData(bytes(data), 512), 0, 0);
        const own = faces.cropUpright(picture, { box, points }, recognizer.config.template);
        const given = new ImageData(bytes(crop), size);
        return [await recognizer.detect(picture), [...own.data], own.width, await recognizer.classify(given)];
    }''', [rgba(image), list(face.box), face.points.tolist(), rgba(crop), len(crop)])
    np.testing.assert_allclose(found[0]['box'], face.box, atol=4)
    np.testing.assert_allclose(found[0]['points'], face.points, atol=4)
    difference = np.abs(np.reshape(pixels, (side, side, 4))[:, :, :3] - crop.astype(float))
    assert difference.mean() < 1 and np.quantile(difference, 0.999) < 12
    [expected] = ExpressionRecognizer(detector=None)([crop])[0]
    np.testing.assert_allclose(given, list(expected.probabilities.values()), atol=1e-3)


def rgba(image: np.ndarray) -> str:
    return base64.b64encode(cv2.cvtColor(image, cv2.COLOR_RGB2RGBA).tobytes()).decode()


@pytest.mark.slow
def test_other_pictures(site, tmp_path):
    """Without a face, broken, of 24 megapixels, of several faces, dropped, and one while another is searched."""
    portrait = Image.open(sample_picture())
    portrait.crop((300, 300, 500, 400)).save(tmp_path / 'suit.png')
    (tmp_path / 'broken.jpg').write_bytes(b'\xff\xd8\xff\xe0 no picture')
    portrait.resize((4000, 4000)).crop((0, 0, 4000, 4000)).resize((6000, 4000)).save(tmp_path / 'large.jpg')
    several = Image.new('RGB', (900, 600))
    for i in range(6):
        several.paste(portrait.crop((130, 20, 430, 320)), (300 * (i % 3), 300 * (i // 3)))
    several.save(tmp_path / 'several.png')

    def choose(name: str, pattern: str) -> str:
        site.page.set_input_files('#file', tmp_path / name)
        return site.says(f'^{name}.*{pattern}')

    assert 'no face found' in choose('suit.png', 'found') and cards(site) == []
    assert 'damaged, or no picture' in choose('broken.jpg', 'JPEG or PNG')
    assert site.page.locator('#status.failed').count() == 1 and site.page.locator('#result').is_hidden()
    assert choose('large.jpg', 'face').startswith('large.jpg: 1 face')
    assert site.page.locator('#status.failed').count() == 0
    assert max(site.page.locator('#view').evaluate('view => [view.width, view.height]')) == 1600
    assert choose('several.png', 'face').startswith('several.png: 6 faces: 6 happiness.')
    assert len(cards(site)) == site.page.locator('.box').count() == 6
    assert site.page.evaluate('document.documentElement.scrollWidth') <= 390
    transfer = site.page.evaluate_handle('''(data) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], 'dropped.png'));
        return transfer;
    }''', base64.b64encode(sample_picture().read_bytes()).decode())
    site.page.set_input_files('#file', tmp_path / 'large.jpg')
    site.page.dispatch_event('footer', 'drop', {'dataTransfer': transfer})  # overtakes it
    assert site.says('^dropped.png.*face').startswith('dropped.png: 1 face')
    site.page.wait_for_timeout(1000)
    assert site.says('^dropped.png') and len(cards(site)) == 1


@pytest.mark.slow
def test_camera_by_keyboard(site):
    site.context.grant_permissions(['camera'])
    site.page.locator('#file').focus()
    outline = site.page.locator('label.button').evaluate('label => getComputedStyle(label).outlineStyle')
    site.page.keyboard.press('Tab')
    assert site.page.evaluate('document.activeElement.id') == 'camera' and outline == 'solid'
    site.page.keyboard.press('Enter')
    [expected] = ExpressionRecognizer()(sample_picture())
    assert site.says('^Camera: 1') == f'Camera: 1 face: {expected.label}.'
    assert [heading for heading, _ in cards(site)] == [f'1 {expected.label}']
    card = site.page.locator('#faces > li').element_handle()
    times = {site.page.locator('#time').inner_text()}
    while len(times) < 3:  # frame after frame; the elements stay
        site.page.wait_for_timeout(50)
        times.add(site.page.locator('#time').inner_text())
    assert card.evaluate('card => card.isConnected')
    assert site.page.evaluate('video.srcObject.active')
    site.page.keyboard.press('Enter')
    site.page.get_by_role('button', name='Use the camera').wait_for()
    assert not site.page.evaluate('video.srcObject.active')


@pytest.mark.slow
def test_runtime_of_the_cdn_and_its_integrity(npm, launch, tmp_path):
    """Any timm model with label names; the CDN is played by the npm package."""
    if not all(integrity == _integrity(npm / 'dist' / name) for name, integrity in RUNTIME.items()):
        pytest.skip('TIMM_LFNSB_ORT_WEB has other files than those that the page names')
    export_web(tiny(), tmp_path / 'page')

    def answer(route, request, more: bytes = b''):
        body = (npm / 'dist' / request.url.rpartition('/')[2]).read_bytes() + more
        kind = 'application/wasm' if request.url.endswith('.wasm') else 'text/javascript'
        route.fulfill(body=body, headers={'content-type': kind, 'access-control-allow-origin': '*'})

    site = launch(tmp_path / 'page', [(CDN + '*', answer)])
    site.says('^Ready')
    assert {url for _, url in site.requests if not url.startswith(site.host)} - {'data:,'} == {CDN + n for n in RUNTIME}
    site.page.set_input_files('#file', sample_picture())
    site.says('^astronaut.png: 1 face: ')
    assert [row.split('\t')[0] for row in cards(site)[0][1]] == NAMES
    for name in RUNTIME:  # changed by whoever has the CDN
        site = launch(tmp_path / 'page', [(CDN + '*', answer), (CDN + name, lambda *call: answer(*call, b' '))])
        assert 'networks cannot be loaded' in site.says('cannot')
