"""Measure a model: answers, agreement with the teacher, calibration, speed."""
