"""TV-L1 optical flow of the videos of an index: computed, quantised and stored.

Imports `config`, `runtime`, `ops`, `data.index`, `data.storage`, `data.video` and `data.files`; `data.clips`,
`evaluate`, `doctor`, `experiments` and `commands` may import it.
"""
