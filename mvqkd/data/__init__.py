"""Speech and its labels. Waveforms are of one rate everywhere."""

SAMPLE_RATE = 16000
