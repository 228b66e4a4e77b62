"""What touches the machine: forward passes, eval mode, seeds, processes, files, fingerprints; knows no other room."""
