"""Reads the bytes of videos and pictures, wherever they are: in files on a local disk, in members of tar files, or on
HTTP servers and object stores.

Imports `errors` and `wording` only; the other packages of `data`, `evaluate`, `report`, `doctor` and `commands` may
import it.
"""
