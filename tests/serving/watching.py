"""Viewers of a worker that no thread drives: what is asked is done at once, and time passes by hand."""


def asked(worker, future):
    while not future.done():
        worker.step()
    return future.result()


def opening(worker, prompt="a ball", take=None, **options):
    return worker.begin(worker.admit(prompt, **options), take)


def opened(worker, prompt="a ball", take=None, **options):
    return asked(worker, opening(worker, prompt, take, **options))


def idle(worker):
    while worker.step():
        pass


def watch(worker, clock, sessions, seconds, step=0.05):
    """Viewers who take whatever is due, while the device works and time passes."""
    pieces = {session: [] for session in sessions}
    end = clock.now + seconds
    while clock.now < end:
        for session in sessions:
            while (piece := worker.read(session)) is not None:
                pieces[session].append(piece)
        if not worker.step():
            clock.now += step
    return pieces
