"""What is measured on a model: answers, agreement, calibration, speed."""
