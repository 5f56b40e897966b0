"""How good predictions are. Needs the packages of the extra `eval`."""
from importlib.util import find_spec

from ..errors import UserError

for package in ('sklearn', 'scipy', 'matplotlib'):
    if find_spec(package) is None:
        raise UserError(f'measuring a model needs {package}: pip install "timm-lfnsb[eval]" brings it.')
