"""placeholder"""
def fitting_micro_batch(model, settings, teacher, device, dtype, processes, force, emit):
    return settings.micro_batch or max(1, 2048 // settings.length)
