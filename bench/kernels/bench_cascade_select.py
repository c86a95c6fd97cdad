"""pytest-benchmark suite of cascade_select.

    pytest bench/kernels/bench_cascade_select.py --benchmark-only

`bench/conftest.py` holds the fixtures.
"""

import cascade_forms
import pytest


@pytest.mark.parametrize("form", cascade_forms.FORMS)
def test_cascade_select(bench_form, device, shape, form):
    bench_form(cascade_forms, device, shape, "forward", form)
