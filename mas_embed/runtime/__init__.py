"""Forward passes, eval mode, seeds, processes, files and argument checks. Nothing here depends on the rest of the package."""
