"""pytest-benchmark suite of mil_nce: `pytest bench/kernels/bench_mil_nce.py --benchmark-only` (conftest.py)."""

import loss_forms
import pytest


@pytest.mark.parametrize("direction", loss_forms.DIRECTIONS)
@pytest.mark.parametrize("form", loss_forms.FORMS)
def test_mil_nce(bench_form, device, shape, direction, form):
    bench_form(loss_forms, device, shape, direction, form)
