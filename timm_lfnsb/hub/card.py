"""Model cards for the Hugging Face Hub, from the JSON of embedded weights or from a timm folder alone."""
from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from textwrap import shorten
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import UserError
from ..labels import EXPRESSIONS_8, canonical_name, model_label_names
from ..models.networks import default_cfgs
from ..train.history import runs_table
from ..util.files import file_sha256, replacing
from ..util.machine import processor
from ..util.text import markdown_table
from ..weights.names import WEIGHTS_DIR, embedded_weights, weights_info

TEMPLATE = Path(__file__).with_name('card.md')
RESULTS = Path(__file__).parent.parent / 'results'
RUNTIMES = {'eager': 'PyTorch', 'compiled': 'torch.compile', 'onnxruntime': 'ONNX Runtime', 'openvino': 'OpenVINO'}
DATA_NAMES = {'ferplus': ('FER+', 'FER+, plurality labels, duplicates removed'), 'rafdb': ('RAF-DB', 'RAF-DB')}
FIGURES = {
    'accuracy': ('accuracy', 'accuracy'), 'balanced_accuracy': ('balanced_accuracy', 'balanced accuracy'),
    'macro_f1': ('f1', 'macro F1'), 'ece': ('expected_calibration_error', 'expected calibration error')}
"""By key in metrics.json: the Hub's name of the metric, and people's."""
FEW_FACES = 50
"""Test faces of a class below which the card forbids claims about it."""


def render_card(info: dict[str, Any], repo_id: str | None = None) -> str:
    """The model card of embedded weights, as Markdown with YAML front matter and its `model-index`.

    Args:
        info: Their JSON, see `weights_info`.
        repo_id: Hub repository the card is for, 'ORG/NAME'; without one it names the weights inside the package.

    Raises:
        UserError: When the JSON lacks something that a card must say.
    """
    try:
        name, labels, data, runs = info['model'], info['label_names'], info['data'], info['runs']
        test, arch, input_size = info['metrics']['test'], name.split('.')[0], tuple(info['input_size'])
        data_name, data_title = DATA_NAMES.get(data['name'], (data['name'], data['name']))
        count = _count(arch, len(labels), input_size)
        counts = {label: row['count'] for label, row in test['per_class'].items()}
        common = sorted(counts, key=lambda label: -counts[label])[:2]
        return _render(
            name, arch, labels, {split: info['metrics'][split] for split in ('test', 'validation')}, repo_id,
            dict(license='apache-2.0', datasets=[data['name']], metrics=['accuracy', 'f1']),
            dataset=(data['name'], data_title), timm_name=name,
            cfg=dict(default_cfgs[arch].default.to_dict(), input_size=input_size),  # the rest is that of every tag
            info=info, params=count.params, macs=count.macs, common=common, data_name=data_name,
            common_share=sum(counts[label] for label in common) / test['count'],
            robustness_table=_robustness(info['robustness']) if 'robustness' in info else '',
            speed=speed_table(name, input_size),
            runs_table=runs_table({**run, 'name': str(i)} for i, run in enumerate(runs, 1)),
            outside=sorted({_outside(run['settings'], i == 0) for i, run in enumerate(runs)} - {''}))
    except KeyError as error:
        raise UserError(f'the JSON of these weights has no {error}: store them with timm-lfnsb weights ship.') from None


def render_card_for_folder(
        path: str | Path, repo_id: str | None = None, metrics: dict[str, Any] | None = None, license: str | None = None,
) -> str:
    """The model card of a timm folder: what the folder tells, or the card of the embedded weights in it.

    Args:
        path: Folder with config.json and model.safetensors, see `timm-lfnsb pack`.
        repo_id: Hub repository the card is for, 'ORG/NAME'.
        metrics: What `timm-lfnsb evaluate` wrote of this model into metrics.json, to be shown on the card.
        license: Identifier of the weights' licence, for instance 'apache-2.0'; without it the card names none.

    Raises:
        UserError: When the folder is none of timm's, or the metrics are of a model with other labels.
    """
    path = Path(path)
    checksum = file_sha256(path / 'model.safetensors') if (path / 'model.safetensors').is_file() else None
    for info in map(weights_info, embedded_weights()):
        if info['sha256'] == checksum:
            return render_card(info, repo_id)
    try:
        with torch.device('meta'):
            model: Any = timm.create_model(f'local-dir:{path}')
        labels = model_label_names(model)
    except Exception as error:  # other people's configs can make timm raise nearly anything
        reason = shorten(str(error), 300, placeholder=' ...')
        raise UserError(f'{path} is no folder of a timm model as timm-lfnsb pack makes them: {reason}') from None
    if metrics is not None and list(map(canonical_name, metrics['label_names'])) != list(map(canonical_name, labels)):
        raise UserError(f"the metrics are of a model with other labels [{', '.join(metrics['label_names'])}].")
    return _render(
        repo_id.partition('/')[2] if repo_id else path.resolve().name, model.pretrained_cfg['architecture'], labels,
        {metrics.get('split', 'data'): metrics} if metrics else {}, repo_id, dict(license=license),
        dataset=('own', 'own data'), timm_name='local-dir:FOLDER', cfg=model.pretrained_cfg, info={},
        params=sum(parameter.numel() for parameter in model.parameters()))


def write_cards(names: Sequence[str], out_dir: Path) -> list[Path]:
    """Write the cards of embedded weights as NAME.md into a folder, each as a whole."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for path in (paths := [out_dir / f'{name}.md' for name in names]):
        with replacing(path) as temporary:
            temporary.write_text(render_card(weights_info(path.stem)), encoding='utf-8')
    return paths


def check_cards(names: Sequence[str], out_dir: Path) -> None:
    """Raise a UserError where a card in a folder is not there, or is not what the JSON of its weights says."""
    cards = {out_dir / f'{name}.md': render_card(weights_info(name)) for name in names}
    stale = [path for path, card in cards.items() if not path.is_file() or path.read_text(encoding='utf-8') != card]
    if stale:
        raise UserError(f"{', '.join(map(str, stale))}: not what the JSON says; write anew with timm-lfnsb card "
                        f"{' '.join(path.stem for path in stale)} --out {out_dir}.")


def weights_table() -> str:
    """The embedded weights as a Markdown table: what their JSON says of the test split."""
    rows = []
    for name in embedded_weights():
        test = weights_info(name)['metrics']['test']
        size = (WEIGHTS_DIR / f'{name}.safetensors').stat().st_size / 1e6
        rows.append([f'`{name}`', *(_figure(test, key) for key in FIGURES), test['count'], f'{size:.1f} MB'])
    return markdown_table(['weights', 'test accuracy', 'balanced accuracy', 'macro F1', 'ECE', 'faces', 'file'], rows)


def speed_table(name: str, input_size: Sequence[int], results: Path = RESULTS) -> str:
    """Milliseconds a face by machine, runtime and batch size, from reports of `timm-lfnsb bench --json` (bench*.json).

    Rows of the bare network count, for weights do not change the speed; rows at another input size do not. Empty where
    nothing was measured.
    """
    rows = []
    for path in sorted(results.glob('bench*.json')):
        report = json.loads(path.read_text(encoding='utf-8'))
        machine, peer = report['machine'], report['settings'].get('peer')
        where = machine.get('gpu') or f"{processor(machine)}, {machine['threads']} threads"
        wanted = [model for model, measured in report['models'].items() if measured['input_size'] == list(input_size)
                  and model.partition('@')[0] in (name, name.split('.')[0])]
        for row in report['results']:
            if (row['model'] in wanted and row['task'] == 'predict' and 'ms_per_image' in row
                    and row.get('form') not in ('unoptimised', 'convolutions')):
                ratio = f"{row['ratio']['median']:.2f} x {peer}" if row.get('ratio') else '-'
                rows.append([where, RUNTIMES.get(row['runtime'], row['runtime']), row['batch'],
                             f"{row['ms_per_image']['median']:.3g}", ratio])
    headers = ['machine', 'runtime', 'batch', 'milliseconds a face', 'time relative to']
    return markdown_table(headers, rows) if rows else ''


def _render(
        title: str, arch: str, labels: Sequence[str], splits: dict[str, dict[str, Any]], repo_id: str | None,
        card_data: dict[str, Any], dataset: tuple[str, str], timm_name: str, **context: Any,
) -> str:
    """The template filled in; of the splits, by name, the first is what the card's metrics are of."""
    faces = set(map(canonical_name, labels)) <= set(EXPRESSIONS_8)
    split, main = next(iter(splits.items()), ('', None))
    if main:
        card_data |= dict(model_name=title, eval_results=[
            EvalResult(
                task_type='image-classification', task_name='Facial expression recognition', dataset_type=dataset[0],
                dataset_name=dataset[1], dataset_split=split, metric_type=metric_type,
                metric_name=people[0].upper() + people[1:], metric_value=round(main[key], 4))
            for key, (metric_type, people) in FIGURES.items()])
        context |= dict(
            figures_table=markdown_table(
                ['', *(f'{name}, {metrics["count"]:,} faces' for name, metrics in splits.items())],
                [[people, *(_figure(metrics, key) for metrics in splits.values())]
                 for key, (_, people) in FIGURES.items()]),
            class_table=_classes(main),
            rare=[f'{label} ({row["count"]})' for label, row in main['per_class'].items()
                  if 0 < row['count'] < FEW_FACES])
    tags = ['facial-expression-recognition', 'emotion-recognition'] if faces else []
    card = ModelCard.from_template(
        ModelCardData(
            library_name='timm', pipeline_tag='image-classification',
            tags=[*tags, 'image-classification', 'timm', 'transformers', arch.split('.')[0]], **card_data),
        template_str=TEMPLATE.read_text(encoding='utf-8'), title=title, arch=arch, labels=list(labels), faces=faces,
        main=main, split=split, repo_id=repo_id, timm_name=f'hf-hub:{repo_id}' if repo_id else timm_name,
        zoo=arch.split('.')[0] in default_cfgs, **context)
    return f'{str(card).strip()}\n'


@cache
def _count(arch: str, num_classes: int, input_size: tuple[int, ...]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)  # fvcore scripts a function that nobody here uses
        from ..models.count import count_model
    return count_model(arch, num_classes=num_classes, pretrained_cfg_overlay={'input_size': input_size})


def _outside(settings: dict[str, Any], first: bool) -> str:
    """What a run learned from that may have seen other images; pretrained weights of this zoo are the earlier runs'."""
    if settings.get('kd_model_name'):
        return f"the teacher `{settings['kd_model_name']}`"
    foreign = first or str(settings['model']).split('.')[0] not in default_cfgs
    return f"pretrained `{settings['model']}`" if settings.get('pretrained') and foreign else ''


def _figure(figures: dict[str, Any], key: str) -> str:
    """A figure with its interval, where it has one."""
    bounds = figures.get(f'{key}_interval')
    return f'{figures[key]:.3f}' + (f' [{bounds[0]:.3f}, {bounds[1]:.3f}]' if bounds else '')


def _classes(metrics: dict[str, Any]) -> str:
    names, rows = metrics['label_names'], []
    for i, name in enumerate(names):
        figures, wrong = metrics['per_class'][name], list(metrics['confusion'][i])
        if not figures['count']:
            rows.append([name, 0, '-', '-', '-', '-'])
            continue
        wrong[i] = 0
        # A class that was never predicted has no precision, whatever scikit-learn puts there.
        precision = _figure(figures, 'precision') if figures['precision_interval'] else 'never predicted'
        rows.append([
            name, f"{figures['count']:,}", precision, _figure(figures, 'recall'), _figure(figures, 'f1'),
            f'{names[wrong.index(max(wrong))]} ({max(wrong)})' if max(wrong) else '-'])
    return markdown_table(['class', 'faces', 'precision', 'recall', 'F1', 'mostly mistaken for'], rows)


def _robustness(measured: dict[str, Any]) -> str:
    rows = []
    for row in measured['rows'].values():
        points = [f'{100 * value:+.1f}' for value in (row['difference'], *row['difference_interval'])]
        rows.append([row['what'], _figure(row, 'accuracy'), '{} [{}, {}]'.format(*points), f"{row['agreement']:.3f}"])
    return markdown_table(['images', 'accuracy', 'difference, in points', 'same label'], rows)
