"""Model cards for the Hugging Face Hub, from the JSON of embedded weights or from a timm folder alone."""
from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import UserError
from ..labels import EXPRESSIONS_8, canonical_name, model_label_names
from ..models.loading import load_model
from ..models.networks import default_cfgs
from ..models.temperature import model_temperature
from ..train.history import runs_table
from ..util.files import replacing
from ..util.machine import processor
from ..util.text import markdown_table
from ..weights.names import WEIGHTS_DIR, embedded_weights, weights_info

TEMPLATE = Path(__file__).with_name('card.md')
RUNTIMES = {'eager': 'PyTorch', 'compiled': 'torch.compile', 'onnxruntime': 'ONNX Runtime', 'openvino': 'OpenVINO'}
DATA_NAMES = {'ferplus': 'FER+, plurality labels, duplicates removed'}
FIGURES = {
    'accuracy': ('accuracy', 'accuracy'), 'balanced_accuracy': ('balanced_accuracy', 'balanced accuracy'),
    'macro_f1': ('f1', 'macro F1'), 'ece': ('expected_calibration_error', 'expected calibration error')}
"""By key in metrics.json: the Hub's name of the metric, and people's."""


def render_card(info: dict[str, Any], repo_id: str | None = None) -> str:
    """The model card of embedded weights, as Markdown with YAML front matter and its `model-index`.

    Args:
        info: Their JSON, see `weights_info`.
        repo_id: Hub repository the card is for, 'ORG/NAME'; without one it names the weights inside the package.
    """
    from ..models.count import count_model  # fvcore warns when it is imported
    name, labels, data = info['model'], info['label_names'], info['data']
    arch, input_size = name.split('.')[0], tuple(info['input_size'])
    count = count_model(arch, num_classes=len(labels), pretrained_cfg_overlay={'input_size': input_size})
    return _render(
        name, arch, labels, {split: info['metrics'][split] for split in ('test', 'validation')}, repo_id,
        dict(license='apache-2.0', datasets=[data['name']], metrics=['accuracy', 'f1']),
        dataset=(data['name'], DATA_NAMES.get(data['name'], data['name'])), timm_name=name,
        cfg=dict(default_cfgs[arch].default.to_dict(), input_size=input_size),  # the rest is that of every tag
        info=info, params=count.params, macs=count.macs,
        robustness_table=_robustness(info['robustness']['rows'].values()) if 'robustness' in info else '',
        speed=speed_table(name, input_size),
        runs_table=runs_table({**run, 'name': str(i)} for i, run in enumerate(info['runs'], 1)),
        # Teachers and pretrained networks may have seen other images; those of this zoo have not.
        outside=sorted({
            network for settings in (run['settings'] for run in info['runs'])
            for network in [*(settings.get('kd_model_name') or '').split(','),
                            settings['model'] if settings.get('pretrained') else '']
            if network and network.split('.')[0] not in default_cfgs}))


def render_card_for_folder(
        path: str | Path, repo_id: str | None = None, metrics: str | Path | None = None, license: str | None = None,
) -> str:
    """The model card of a timm folder: what the folder tells.

    Args:
        path: Folder with config.json and model.safetensors, see `timm-lfnsb pack`.
        repo_id: Hub repository the card is for, 'ORG/NAME'.
        metrics: The metrics.json that `timm-lfnsb evaluate` wrote of this model, to be shown on the card.
        license: Identifier of the weights' licence, for instance 'apache-2.0'; without it the card names none.

    Raises:
        UserError: When the folder is none of timm's, or the metrics are of a model with other labels.
    """
    model: Any = load_model(f'local-dir:{path}')
    labels = model_label_names(model)
    try:
        measured: Any = json.loads(Path(metrics).read_text(encoding='utf-8')) if metrics else None
        if metrics and [*map(canonical_name, measured['label_names'])] != [*map(canonical_name, labels)]:
            raise UserError(f"{metrics} is of a model with other labels [{', '.join(measured['label_names'])}].")
        return _render(
            repo_id.partition('/')[2] if repo_id else Path(path).resolve().name, model.pretrained_cfg['architecture'],
            labels, {measured['split']: measured} if measured else {}, repo_id, dict(license=license),
            dataset=('own', 'own data'), timm_name='local-dir:FOLDER', cfg=model.pretrained_cfg, info={},
            params=sum(parameter.numel() for parameter in model.parameters()), temperature=model_temperature(model))
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{metrics} is no metrics.json of timm-lfnsb evaluate.') from None


def write_cards(names: Sequence[str], out_dir: Path) -> list[Path]:
    """Write the cards of embedded weights as NAME.md into a folder, each as a whole."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for path in (paths := [out_dir / f'{name}.md' for name in names]):
        with replacing(path) as temporary:
            temporary.write_text(render_card(weights_info(path.stem)), encoding='utf-8')
    return paths


def weights_table() -> str:
    """The embedded weights as a Markdown table: what their JSON says of the test split."""
    rows = []
    for name in embedded_weights():
        test = weights_info(name)['metrics']['test']
        size = (WEIGHTS_DIR / f'{name}.safetensors').stat().st_size / 1e6
        rows.append([f'`{name}`', *(_figure(test, key) for key in FIGURES), test['count'], f'{size:.1f} MB'])
    return markdown_table(['weights', 'test accuracy', 'balanced accuracy', 'macro F1', 'ECE', 'faces', 'file'], rows)


def speed_table(name: str, input_size: Sequence[int], results: Path = TEMPLATE.parents[1] / 'results') -> str:
    """Milliseconds a face by machine, runtime and batch size at an input size, or '' where nothing was measured.

    From reports of `timm-lfnsb bench --json` (bench*.json), also of the bare network: weights do not change the speed.
    """
    rows = []
    for path in sorted(results.glob('bench*.json')):
        report = json.loads(path.read_text(encoding='utf-8'))
        machine, peer = report['machine'], report['settings'].get('peer')
        where = machine.get('gpu') or f"{processor(machine)}, {machine['threads']} threads"
        for row in report['results']:
            if (row['model'].partition('@')[0] in (name, name.split('.')[0]) and row['task'] == 'predict'
                    and report['models'][row['model']]['input_size'] == list(input_size) and 'ms_per_image' in row
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
            class_table=_classes(main), groups_table=_groups(main.get('groups')))
    tags = ['facial-expression-recognition', 'emotion-recognition'] if faces else []
    card = ModelCard.from_template(
        ModelCardData(
            library_name='timm', pipeline_tag='image-classification',
            tags=[*tags, 'image-classification', 'timm', 'transformers', arch.split('.')[0]], **card_data),
        template_str=TEMPLATE.read_text(encoding='utf-8'), title=title, arch=arch, labels=list(labels), faces=faces,
        main=main, split=split, repo_id=repo_id, timm_name=f'hf-hub:{repo_id}' if repo_id else timm_name,
        zoo=arch.split('.')[0] in default_cfgs, **context)
    return f'{str(card).strip()}\n'


def _figure(figures: Mapping[str, Any], key: str) -> str:
    """A figure with its interval, where it has one; '-' where there is none, as of a class without faces."""
    value, bounds = figures[key], figures.get(f'{key}_interval')
    return '-' if value is None else f'{value:.3f}' + (f' [{bounds[0]:.3f}, {bounds[1]:.3f}]' if bounds else '')


def _classes(metrics: dict[str, Any]) -> str:
    names, rows = metrics['label_names'], []
    for i, (name, row) in enumerate(zip(names, metrics['confusion'], strict=True)):
        figures, wrong = metrics['per_class'][name], [0 if j == i else count for j, count in enumerate(row)]
        # A class that was never predicted has no precision, whatever scikit-learn puts there.
        never = figures['count'] and not figures['precision_interval']
        rows.append([
            name, f"{figures['count']:,}", 'never predicted' if never else _figure(figures, 'precision'),
            _figure(figures, 'recall'), _figure(figures, 'f1'),
            f'{names[wrong.index(max(wrong))]} ({max(wrong)})' if max(wrong) else '-'])
    return markdown_table(['class', 'faces', 'precision', 'recall', 'F1', 'mostly mistaken for'], rows)


def _groups(measured: dict[str, Any] | None) -> str:
    """Figures by group and the largest gaps, '' where nothing was measured by group."""
    if not measured:
        return ''
    from ..evaluate.groups import group_rows
    return markdown_table(['by', 'group', 'faces', *(people for _, people in FIGURES.values())],
                          group_rows(measured, _figure))


def _robustness(measured: Iterable[dict[str, Any]]) -> str:
    rows = []
    for row in measured:
        points = [f'{100 * value:+.1f}' for value in (row['difference'], *row['difference_interval'])]
        rows.append([row['what'], _figure(row, 'accuracy'), '{} [{}, {}]'.format(*points), f"{row['agreement']:.3f}"])
    return markdown_table(['images', 'accuracy', 'difference, in points', 'same label'], rows)
