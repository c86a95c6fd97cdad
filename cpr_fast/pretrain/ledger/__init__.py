"""The ledger of a run: what every step drew, computed and mined, as a chain of digests in `ledger.jsonl`.

Imports `config`, `runtime`, `pretrain.state` and `pretrain.step`; `pretrain.run`, `experiments`, `commands` and
`bench` may import it.
"""
