"""States of training in files that are whole or not there, and never read by running code from them."""

from flipout.storage.states import read_state, write_state

__all__ = ["read_state", "write_state"]
