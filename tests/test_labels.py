"""Label names by name, never by position, and class maps as people write them."""
from __future__ import annotations

import codecs

import pytest

from timm_lfnsb.labels import EXPRESSIONS_7, LabelError, match_labels, read_class_map

NAMES = ['anger', 'Überraschung', 'none expression']
TEXTS = {
    'clean': '\n'.join(NAMES).encode() + b'\n', 'no last line end': '\n'.join(NAMES).encode(),
    'bom': codecs.BOM_UTF8 + '\n'.join(NAMES).encode(), 'crlf': '\r\n'.join([*NAMES, '', '']).encode(),
    'blank lines': ('\n \n' + '\n\n\t'.join(NAMES) + '  \n\n\n').encode(),
    'notepad': codecs.BOM_UTF16_LE + '\r\n'.join([*NAMES, '']).encode('utf-16-le'),
    'big endian': codecs.BOM_UTF16_BE + '\r'.join([*NAMES, '']).encode('utf-16-be'),
}


@pytest.mark.parametrize('text', TEXTS.values(), ids=TEXTS)
def test_class_maps_as_people_write_them(text, tmp_path):
    (tmp_path / 'map.txt').write_bytes(text)
    assert read_class_map(tmp_path / 'map.txt') == NAMES


@pytest.mark.parametrize('text, words', [
    (b'', 'has no names'), (codecs.BOM_UTF8 + b'\r\n \n', 'has no names'), ('Überraschung'.encode('latin-1'), 'UTF-8'),
    (b'anger\nhappy\nHappiness\n', r'twice \(Happiness, happy\)'), (b'fear\nfear\n', r'twice \(fear\)')])
def test_class_maps_that_mean_nothing_are_refused(text, words, tmp_path):
    (tmp_path / 'map.txt').write_bytes(text)
    with pytest.raises(LabelError, match=f'map.txt.*{words}'):
        read_class_map(tmp_path / 'map.txt')


def test_unknown_labels_say_which_are_near():
    with pytest.raises(LabelError) as error:
        match_labels(['Hapiness', 'surprize', 'boredom', 'angry'], EXPRESSIONS_7)
    assert ("'Hapiness' (did you mean happiness?), 'surprize' (did you mean surprise?), 'boredom': the data"
            in str(error.value))
