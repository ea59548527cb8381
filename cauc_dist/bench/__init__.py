"""What limits a run on this store and this machine: its data, its loss, its step, more ranks."""
