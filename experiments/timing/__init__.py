"""What the method costs, a subject a module; experiments/latency.py is the command.

A round calls the pipeline once for every variant and then once more in the opposite order, so that a drift of the
machine falls on all of them alike. A step is what lies between two of the pipeline's callbacks at the end of a step:
denoiser, guidance, scheduler and whatever they wait for. On CUDA it is taken with events in the stream, without waiting
for the device in between; elsewhere with the clock. Every ratio is of the same steps of the same round; stated is the
median over rounds, and the interval that holds it whatever the distribution. Calls differ among each other by more than
the steps within one, so rounds are many and calls short.
"""
