"""One predict and one measurement update of the extended Kalman filter."""
