from utils.tests.environment import hermetic

hermetic()
