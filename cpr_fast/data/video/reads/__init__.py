"""The bytes of a video file that are read for given frames, for those who fetch them before.

Imports `data.video` and `data.files`; `data` may import it.
"""
