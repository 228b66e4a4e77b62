"""An extension of griffe: the section `Example:` of a docstring is shown as code, as griffe shows `Examples:`."""

import re

import griffe


class ExampleSections(griffe.Extension):
    """Renames the section in every docstring."""

    def on_object(self, *, obj, **kwargs):
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
