// How often a text repeats itself: counts of its n-grams, exact and in one walk over growing n.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace cpt {

// Numbers distinct keys and counts them: open addressing, a key's number is its slot.
class KeyCounter {
 public:
  void reset(std::size_t most_keys) {
    bits_ = 4;
    while ((std::size_t{1} << bits_) < 2 * most_keys) ++bits_;
    slots_.assign(std::size_t{1} << bits_, Slot{kNone, 0});
  }

  // Counts `key` (any but ~0) and returns its slot.
  std::uint32_t add(std::uint64_t key) {
    const std::size_t mask = slots_.size() - 1;
    std::size_t at = ((key ^ (key >> 31)) * 0x9e3779b97f4a7c15ULL) >> (64 - bits_);
    while (slots_[at].key != key && slots_[at].key != kNone) at = (at + 1) & mask;
    slots_[at].key = key;
    ++slots_[at].count;
    return static_cast<std::uint32_t>(at);
  }

  std::uint32_t count(std::uint32_t slot) const { return slots_[slot].count; }

 private:
  static constexpr std::uint64_t kNone = ~std::uint64_t{0};

  struct Slot {
    std::uint64_t key;
    std::uint32_t count;
  };

  std::vector<Slot> slots_;
  unsigned bits_ = 4;
};

// Walks n = 2, 3, ... over a sequence of symbols below 2^31. An n-gram is named by the name of its first
// n-1 symbols and the last one, so names are exact; where the first n-1 occur once, so does every longer
// one that begins there, and the place is left out from then on.
class NgramWalk {
 public:
  // Longer sequences are judged by this much of their beginning: it bounds the table at 32 MiB.
  static constexpr std::size_t kLongest = std::size_t{1} << 20;

  struct Level {
    std::size_t total = 0;     // n-grams
    std::size_t distinct = 0;  // different ones
    std::size_t repeated = 0;  // different ones that occur more than once
    std::size_t most = 0;      // occurrences of the commonest
  };

  // Symbols must live as long as the walk.
  void begin(const std::uint32_t* symbols, std::size_t size) {
    symbols_ = symbols;
    size_ = std::min(size, kLongest);
    n_ = 1;
    places_.resize(size_);
    for (std::size_t at = 0; at < size_; ++at) places_[at] = {static_cast<std::uint32_t>(at), symbols[at]};
  }

  // The next n. Afterwards `repeats` are the places, ascending, whose n-gram occurs more than once.
  Level next() {
    ++n_;
    Level level;
    level.total = size_ >= n_ ? size_ - n_ + 1 : 0;
    while (!places_.empty() && places_.back().at >= level.total) places_.pop_back();
    level.distinct = level.total - places_.size();  // those left out before occur once
    level.most = level.total ? 1 : 0;
    counter_.reset(places_.size());
    for (Place& place : places_) {
      const std::uint64_t last = symbols_[place.at + n_ - 1];
      place.name = counter_.add(std::uint64_t{place.name} << 32 | last);
      const std::uint32_t count = counter_.count(place.name);
      level.distinct += count == 1;
      level.repeated += count == 2;
      level.most = std::max<std::size_t>(level.most, count);
    }
    const auto once = [this](const Place& place) { return counter_.count(place.name) < 2; };
    places_.erase(std::remove_if(places_.begin(), places_.end(), once), places_.end());
    return level;
  }

  struct Place {
    std::uint32_t at;
    std::uint32_t name;
  };

  const std::vector<Place>& repeats() const { return places_; }
  std::uint32_t count(const Place& place) const { return counter_.count(place.name); }
  std::size_t n() const { return n_; }

 private:
  const std::uint32_t* symbols_ = nullptr;
  std::size_t size_ = 0;
  std::size_t n_ = 1;
  std::vector<Place> places_;
  KeyCounter counter_;
};

}  // namespace cpt
