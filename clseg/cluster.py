"""Auto-encoder features to pseudo-classes."""


def pseudo_classes(store, rows, stage, earlier, device):
    raise NotImplementedError
