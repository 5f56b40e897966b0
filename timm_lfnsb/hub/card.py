"""Model cards for the Hugging Face Hub, from the JSON of embedded weights or from a timm folder alone.

Needs jinja2, which torch brings, and huggingface_hub, which timm brings.
"""
from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined
from timm.models import get_pretrained_cfg

from ..labels import EXPRESSIONS_8, canonical_name
from ..models.networks import default_cfgs
from ..train.history import find_recipe, run_cells
from ..util.files import file_sha256, replacing
from ..util.machine import processor
from ..weights.names import embedded_weights, weights_info

TEMPLATE = Path(__file__).with_name('card.md')

RESULTS = Path(__file__).parent.parent / 'results'

RUNTIMES = {'eager': 'PyTorch', 'compiled': 'torch.compile', 'onnxruntime': 'ONNX Runtime', 'openvino': 'OpenVINO'}

DATA_TITLES = {'ferplus': 'FER+, plurality labels, duplicates removed', 'rafdb': 'RAF-DB'}

FEW_FACES = 50
"""Test faces of a class below which the card forbids claims about it."""

PAPER = {'lfnsb': (('RAF-DB', '91.07 %'), ('AffectNet-7', '66.57 %'), ('AffectNet-8', '63.12 %'))}
"""Accuracies as the paper prints them in Tables 6 to 8, by network."""

CITATION = """\
@article{chen2024lightweight,
  title   = {A Lightweight Model Enhancing Facial Expression Recognition with Spatial Bias and Cosine-Harmony Loss},
  author  = {Chen, Xuefeng and Huang, Liangyu},
  journal = {Computation},
  volume  = {12},
  number  = {10},
  pages   = {201},
  year    = {2024},
  doi     = {10.3390/computation12100201}
}"""


class CardError(ValueError):
    """A card that cannot be made; the message says what to do."""


def render_card(info: dict[str, Any], repo_id: str | None = None) -> str:
    """The model card of embedded weights.

    Args:
        info: Their JSON, see `weights_info`.
        repo_id: Hub repository the card is for, 'ORG/NAME'; without one it names the weights inside the package.

    Returns:
        Markdown with YAML front matter, metrics as `model-index` among it.

    Raises:
        CardError: When the JSON lacks something that a card must say.
    """
    try:
        return _render_embedded(info, repo_id)
    except KeyError as error:
        raise CardError(f'the JSON of these weights has no {error}: store them with timm-lfnsb weights ship.') from None


def render_card_for_folder(
        path: str | Path,
        repo_id: str | None = None,
        metrics: dict[str, Any] | None = None,
        license: str | None = None,
) -> str:
    """The model card of a timm folder (`timm-lfnsb pack`): what the folder tells, and nothing else.

    A folder that holds embedded weights gets their card.

    Args:
        path: Folder with config.json and model.safetensors.
        repo_id: Hub repository the card is for, 'ORG/NAME'.
        metrics: What `timm-lfnsb evaluate` wrote of this model into metrics.json, to be shown on the card.
        license: Identifier of the weights' licence, for instance 'apache-2.0'; without it the card names none.

    Raises:
        CardError: When the folder is none of timm's, or the metrics are of a model with other labels.
    """
    path = Path(path)
    try:
        config = json.loads((path / 'config.json').read_text(encoding='utf-8'))
        arch, cfg = config['architecture'], config['pretrained_cfg']
        labels = config.get('label_names') or cfg.get('label_names') or []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CardError(f'{path} has no config.json of timm: give a folder made by timm-lfnsb pack.') from None
    weights = path / 'model.safetensors'
    if weights.is_file():
        checksum = file_sha256(weights)
        for name in embedded_weights():
            if weights_info(name)['sha256'] == checksum:
                return render_card(weights_info(name), repo_id)
    if isinstance(labels, dict):
        labels = [labels[index] for index in sorted(labels, key=int)]
    if not labels:
        raise CardError(f'{path / "config.json"} has no label_names: make the folder with timm-lfnsb pack.')
    if metrics is not None and [canonical_name(name) for name in metrics['label_names']] != [
            canonical_name(name) for name in labels]:
        raise CardError(f"the metrics are of a model with other labels [{', '.join(metrics['label_names'])}].")
    title = (repo_id or path.resolve().name).rpartition('/')[2]
    zoo = arch.split('.')[0] in default_cfgs
    return _render(
        ModelCardData(
            license=license, library_name='timm', pipeline_tag='image-classification', tags=_tags(arch, labels),
            **_results(title, {'type': 'own', 'name': 'own data'}, metrics)),
        arch, cfg, labels, repo_id, f'hf-hub:{repo_id}' if repo_id else 'local-dir:FOLDER',
        title=title, zoo=zoo, macs=None, metrics=metrics,
        splits={metrics.get('split', 'data'): metrics} if metrics else {}, main=metrics,
        model_args=config.get('model_args') or {})


def write_cards(names: Sequence[str], out_dir: Path) -> list[Path]:
    """Write the cards of embedded weights as NAME.md into a folder, each as a whole."""
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in names:
        card = render_card(weights_info(name))
        path = out_dir / f'{name}.md'
        with replacing(path) as temporary:
            temporary.write_text(card, encoding='utf-8')
        paths.append(path)
    return paths


def stale_cards(names: Sequence[str], out_dir: Path) -> list[Path]:
    """The cards in a folder that are not there or not what the JSON of their weights says."""
    stale = []
    for name in names:
        path = out_dir / f'{name}.md'
        if not path.is_file() or path.read_text(encoding='utf-8') != render_card(weights_info(name)):
            stale.append(path)
    return stale


def _render_embedded(info: dict[str, Any], repo_id: str | None) -> str:
    name = info['model']
    arch = name.split('.')[0]
    labels, data, splits = info['label_names'], info['data'], info['metrics']
    title = DATA_TITLES.get(data['name'], data['name'])
    cfg = get_pretrained_cfg(arch)  # mean and std are those of every tag
    if cfg is None:
        raise CardError(f'there is no network {arch}.')
    return _render(
        ModelCardData(
            license='apache-2.0', library_name='timm', pipeline_tag='image-classification', tags=_tags(arch, labels),
            datasets=[data['name']], metrics=['accuracy', 'f1'],
            **_results(name, {'type': data['name'], 'name': title}, splits['test'])),
        arch, dict(cfg.to_dict(), input_size=info['input_size']), labels, repo_id,
        f'hf-hub:{repo_id}' if repo_id else name,
        title=name, data_name='FER+' if data['name'] == 'ferplus' else data['name'], zoo=True,
        common=_common(splits['test']), macs=_macs(arch, len(labels), tuple(info['input_size'])), info=info,
        test=splits['test'],
        metrics=splits['test'], splits={key: splits[key] for key in ('test', 'validation') if key in splits},
        main=splits['test'], paper=PAPER.get(arch), temperature=info.get('temperature'),
        calibration=info.get('calibration'), robustness=info.get('robustness'), speed=speed_table(name),
        notes=info.get('notes', []),
        outside=sorted({_outside(run['settings'], info['runs'][:i]) for i, run in enumerate(info['runs'])} - {''}),
        run_rows=[_run_row(run, info['input_size']) for run in info['runs']],
        train_counts=', '.join(f'{label} {count:,}' for label, count in data['splits']['train']['counts'].items()))


def _render(
        data: ModelCardData,
        arch: str,
        cfg: dict[str, Any],
        labels: Sequence[str],
        repo_id: str | None,
        timm_name: str,
        **context: Any,
) -> str:
    main, splits, paper = context.pop('main'), context['splits'], context.setdefault('paper', None)
    for key in ('info', 'test', 'temperature', 'calibration', 'robustness', 'speed'):
        context.setdefault(key, None)
    context.setdefault('notes', [])
    context.setdefault('outside', [])
    context.setdefault('train_counts', '')
    params = _params(arch, len(labels), context.pop('model_args', {}))
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    body = environment.from_string(TEMPLATE.read_text(encoding='utf-8')).render(
        arch=arch, labels=list(labels), repo_id=repo_id, timm_name=timm_name, params=params, num=_num,
        input_size=cfg['input_size'],
        faces={canonical_name(label) for label in labels} <= set(EXPRESSIONS_8),
        facts_table=_facts(cfg, labels, context.pop('macs'), licensed=context['info'] is not None),
        figures_table=_figures(splits, paper) if splits else '',
        main_split=next(iter(splits), ''),
        class_table=_classes(main) if main else '',
        rare=[f'{name} ({row["count"]})' for name, row in main['per_class'].items()
              if 0 < row['count'] < FEW_FACES] if main else [],
        never_right=_never_right(main) if main else [],
        robustness_table=_robustness(context['robustness']) if context['robustness'] else '',
        runs_table=_runs(context.pop('run_rows', [])),
        citation=CITATION, **context)
    return f'---\n{data.to_yaml()}\n---\n\n{body.strip()}\n'


def _outside(settings: dict[str, Any], earlier: Sequence[dict[str, Any]]) -> str:
    """What a run learned from that may have seen other images; pretrained weights of this zoo are the earlier runs'."""
    if settings.get('kd_model_name'):
        return f"the teacher `{settings['kd_model_name']}`"
    own = earlier and str(settings['model']).split('.')[0] in default_cfgs
    return f"pretrained `{settings['model']}`" if settings.get('pretrained') and not own else ''


def _tags(arch: str, labels: Sequence[str]) -> list[str]:
    tags = ['image-classification', 'timm', 'transformers', arch.split('.')[0]]
    if {canonical_name(label) for label in labels} <= set(EXPRESSIONS_8):
        tags[:0] = ['facial-expression-recognition', 'emotion-recognition']
    return tags


def _results(name: str, data: dict[str, str], metrics: dict[str, Any] | None) -> dict[str, Any]:
    """The arguments that make a model-index."""
    if not metrics:
        return {}
    figures = (
        ('accuracy', 'accuracy', 'Accuracy'), ('balanced_accuracy', 'balanced_accuracy', 'Balanced accuracy'),
        ('f1', 'macro_f1', 'Macro F1'), ('expected_calibration_error', 'ece', 'Expected calibration error'))
    return dict(model_name=name, eval_results=[
        EvalResult(
            task_type='image-classification', task_name='Facial expression recognition', dataset_type=data['type'],
            dataset_name=data['name'], dataset_split=metrics.get('split', 'test'), metric_type=metric_type,
            metric_name=metric_name, metric_value=round(metrics[key], 4))
        for metric_type, key, metric_name in figures])


def _params(arch: str, num_classes: int, model_args: dict[str, Any]) -> int:
    kwargs: dict[str, Any] = {**model_args, 'num_classes': num_classes}
    try:
        with torch.device('meta'):
            model = timm.create_model(arch, **kwargs)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = ' '.join(str(error).split())
        raise CardError(f'cannot create the model {arch} that config.json names: {reason}') from None
    return sum(parameter.numel() for parameter in model.parameters())


@cache
def _macs(arch: str, num_classes: int, input_size: tuple[int, ...]) -> int | None:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)  # fvcore scripts a function that nobody here uses
        from ..models.count import count_model
    kwargs: dict[str, Any] = {'img_size': input_size[1]} if default_cfgs[arch].default.fixed_input_size else {}
    model = timm.create_model(arch, num_classes=num_classes, **kwargs)
    count = count_model(arch, model)
    return count.macs if tuple(count.input_size) == input_size else None


def _num(value: float | None, sign: str = '') -> str:
    return '-' if value is None else f'{value:{sign}.3f}'


def _with_interval(figures: dict[str, Any], key: str) -> str:
    bounds = figures.get(f'{key}_interval')
    return _num(figures[key]) + (f' [{_num(bounds[0])}, {_num(bounds[1])}]' if bounds else '')


def _table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [headers, ['---'] * len(headers), *rows]
    return '\n'.join('| ' + ' | '.join(str(cell) for cell in line) + ' |' for line in lines)


def _facts(cfg: dict[str, Any], labels: Sequence[str], macs: int | None, licensed: bool) -> str:
    def values(key: str) -> str:
        return ', '.join(f'{value:g}' for value in cfg[key])

    crop = f' and central crop of {cfg["crop_pct"]:g}' if cfg.get('crop_pct', 1) != 1 else ''
    rows = [
        ['labels, in the order of the outputs', ', '.join(labels)],
        ['input', f"{'x'.join(map(str, cfg['input_size']))}, {cfg['interpolation']} resize{crop}, "
                  f"mean {values('mean')}, std {values('std')}"],
    ]
    if macs:
        rows.append(['multiply-accumulates at that size', f'{macs / 1e6:.0f} million'])
    if licensed:
        rows.append(['licence of code and weights', 'Apache-2.0'])
    return _table(['', ''], rows)


def _figures(splits: dict[str, dict[str, Any]], paper: Sequence[tuple[str, str]] | None) -> str:
    headers = ['', *(f'{split}, {metrics["count"]:,} faces' for split, metrics in splits.items())]
    rows = [
        ['accuracy', *(_with_interval(metrics, 'accuracy') for metrics in splits.values())],
        ['balanced accuracy', *(_with_interval(metrics, 'balanced_accuracy') for metrics in splits.values())],
        ['macro F1', *(_num(metrics['macro_f1']) for metrics in splits.values())],
        ['expected calibration error', *(_num(metrics['ece']) for metrics in splits.values())],
    ]
    if paper:
        headers.append("the paper's own figures, other data: not comparable")
        rows[0].append(', '.join(f'{data} {value}' for data, value in paper))
        rows[1:] = [[*row, ''] for row in rows[1:]]
    return _table(headers, rows)


def _classes(metrics: dict[str, Any]) -> str:
    names, rows = metrics['label_names'], []
    for i, name in enumerate(names):
        figures = metrics['per_class'][name]
        if not figures['count']:
            rows.append([name, 0, '-', '-', '-', '-'])
            continue
        wrong = [0 if j == i else count for j, count in enumerate(metrics['confusion'][i])]
        mistaken = f'{names[wrong.index(max(wrong))]} ({max(wrong)})' if max(wrong) else '-'
        # A class that was never predicted has no precision, whatever scikit-learn puts there.
        precision = _with_interval(figures, 'precision') if figures['precision_interval'] else 'never predicted'
        rows.append([
            name, f"{figures['count']:,}", precision, _with_interval(figures, 'recall'), _with_interval(figures, 'f1'),
            mistaken])
    return _table(['class', 'faces', 'precision', 'recall', 'F1', 'mostly mistaken for'], rows)


def _never_right(metrics: dict[str, Any]) -> list[str]:
    """Classes that were predicted, but never rightly, with how often."""
    confusion, names = metrics['confusion'], metrics['label_names']
    columns = [sum(row[i] for row in confusion) for i in range(len(names))]
    return [f'{name} (given {columns[i]} times)' for i, name in enumerate(names) if columns[i] and not confusion[i][i]]


def _robustness(measured: dict[str, Any]) -> str:
    rows = []
    for row in measured['rows'].values():
        low, high = row['difference_interval']
        rows.append([
            row['what'], _with_interval(row, 'accuracy'),
            f"{100 * row['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]", _num(row['agreement'])])
    return _table(['images', 'accuracy', 'difference, in points', 'same label'], rows)


def _common(metrics: dict[str, Any]) -> str:
    """How much of a split its two largest classes are."""
    counts = {name: row['count'] for name, row in metrics['per_class'].items()}
    first, second = sorted(counts, key=lambda name: -counts[name])[:2]
    return f'{100 * (counts[first] + counts[second]) / metrics["count"]:.0f} % of which are {first} or {second}'


def _run_row(run: dict[str, Any], input_size: Sequence[int]) -> dict[str, str]:
    cells = run_cells({**find_recipe(run['settings']), **run})
    return {**cells, 'size': str(input_size[-1])} if cells['size'] == "model's" else cells


def _runs(rows: Sequence[dict[str, str]]) -> str:
    if not rows:
        return ''
    headers = [
        'recipe', 'model', 'epochs', 'size', 'batch', 'optimiser', 'augmentation', 'loss', 'seed', 'validation curve']
    return _table(['', *headers], [[i, *(row[key] for key in headers)] for i, row in enumerate(rows, 1)])


def speed_table(name: str, results: Path = RESULTS) -> str | None:
    """Milliseconds a face by machine, runtime and batch size, from reports of `timm-lfnsb bench --json` (bench*.json).

    Args:
        name: Name of the weights; rows of the bare network count as well, for weights do not change the speed.
        results: Folder of the reports.

    Returns:
        A Markdown table, of each network the fastest form and memory format; None without a measured row.
    """
    rows = []
    for path in sorted(results.glob('bench*.json')):
        report = json.loads(path.read_text(encoding='utf-8'))
        fastest: dict[tuple[str, int], dict[str, Any]] = {}
        for row in report['results']:
            key = row['runtime'], row['batch']
            if row['task'] != 'predict' or row['model'] not in (name, name.split('.')[0]) or 'ms_per_image' not in row:
                continue
            if row['form'] in ('unoptimised', 'convolutions'):
                continue
            if key not in fastest or _median(row) < _median(fastest[key]):
                fastest[key] = row
        machine, peer = report['machine'], report['settings'].get('peer')
        where = machine.get('gpu') or f"{processor(machine)}, {machine['threads']} threads"
        for (runtime, batch), row in fastest.items():
            ratio = f"{row['ratio']['median']:.2f} x {peer}" if row.get('ratio') else '-'
            rows.append([where, RUNTIMES.get(runtime, runtime), batch, f'{_median(row):.3g}', ratio])
    return _table(['machine', 'runtime', 'batch', 'milliseconds a face', 'time relative to'], rows) if rows else None


def _median(row: dict[str, Any]) -> float:
    return row['ms_per_image']['median']
