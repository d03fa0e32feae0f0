// Which source each sample of one stage comes from: exact shares, evenly interleaved, any sample at once.
//
// Time is the sample number t of the stage. E_s(t), the exact share of source s among the first t samples, is a
// rational number; the samples are cut into blocks, and within a block a share is constant. Two levels of one
// scheduling problem round E to whole samples:
//   borders: at every border of blocks the count C_s is floor(E_s) or ceil(E_s);
//   slots: within a block the k-th of q samples of a source lies in slots floor((k-1)B/q) .. ceil(kB/q)-1.
// Both are unit jobs with releases and deadlines for which a fractional schedule, E itself, fills every slot; so a
// whole one exists, and taking the released job of earliest deadline finds it (R. Tijdeman, The chairman
// assignment problem, Discrete Mathematics 32, 1980). Hence |C - E| < 1 at borders and < 2 everywhere.
// Of a border one bit a source is kept: whether C is the ceiling.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace cpt {

// A source's share of a stage moves from start to end (in units of the whole) over the stage's samples; the source
// itself is read in blocks first_block .. last_block-1 only, where it takes turns with others in one share.
struct Lane {
  std::int64_t start = 0;
  std::int64_t end = 0;
  std::int64_t first_block = 0;
  std::int64_t last_block = 0;
};

class StageOrder {
 public:
  static constexpr std::int64_t kMaxUnit = std::int64_t{1} << 40;
  static constexpr std::int64_t kMaxSamples = std::int64_t{1} << 40;
  static constexpr std::int64_t kMaxBlock = 1024;
  static constexpr std::int64_t kMaxHeldBlocks = std::int64_t{1} << 26;
  static constexpr std::int64_t kForever = std::int64_t{1} << 62;

  // samples = 0: the stage has no end (shares that do not move alone). The lanes of every moment add up to `unit`.
  StageOrder(std::vector<Lane> lanes, std::int64_t unit, std::int64_t samples, std::int64_t block)
      : lanes_(std::move(lanes)), unit_(unit), samples_(samples), block_(block) {
    check();
    moves_ = std::any_of(lanes_.begin(), lanes_.end(), [](const Lane& l) { return l.start != l.end; });
    const bool turns = std::any_of(lanes_.begin(), lanes_.end(),
                                   [](const Lane& l) { return l.first_block > 0 || l.last_block < kForever; });
    if ((moves_ || turns) && samples_ == 0) throw std::invalid_argument("a stage that changes needs an end");
    denominator_ = moves_ ? Wide{2} * samples_ * unit_ : Wide{unit_};
    const std::int64_t blocks = samples_ == 0 ? kForever : (samples_ + block_ - 1) / block_;
    // Constant shares come to whole numbers, hence to the same state, after every `unit` samples.
    const std::int64_t repeats = moves_ || turns ? kForever : unit_ / std::gcd(unit_, block_);
    held_ = std::min(repeats, blocks);
    period_ = repeats;
    if (held_ > kMaxHeldBlocks)
      throw std::invalid_argument("the stage has " + std::to_string(held_) + " blocks of different counts");
    lay_borders();
  }

  std::size_t size() const { return lanes_.size(); }

  // Lane of a sample, and its number among the samples of that lane.
  std::pair<std::size_t, std::int64_t> at(std::int64_t sample) const {
    if (sample < 0 || (samples_ > 0 && sample >= samples_)) throw std::out_of_range("no such sample in the stage");
    std::vector<std::int64_t> counts;
    const std::size_t lane = walk(sample, counts);
    return {lane, counts[lane]};
  }

  // Samples of each lane among the first `samples` ones.
  std::vector<std::int64_t> counts(std::int64_t samples) const {
    if (samples < 0 || (samples_ > 0 && samples > samples_)) throw std::out_of_range("the stage has fewer samples");
    std::vector<std::int64_t> counts;
    walk(samples, counts);
    return counts;
  }

 private:
  __extension__ typedef __int128 Wide;
  static constexpr std::int64_t kFarthest = std::int64_t{1} << 34;  // blocks; a later deadline is none

  struct Exact {
    std::int64_t whole;
    Wide rest;  // over denominator_
  };

  struct Candidate {
    std::int64_t deadline;
    Wide rest;
    std::size_t lane;
    bool operator<(const Candidate& other) const {
      if (deadline != other.deadline) return deadline < other.deadline;
      if (rest != other.rest) return rest > other.rest;
      return lane < other.lane;
    }
  };

  void check() const {
    if (lanes_.empty() || unit_ < 1 || unit_ > kMaxUnit || samples_ < 0 || samples_ > kMaxSamples || block_ < 1 ||
        block_ > kMaxBlock)
      throw std::invalid_argument("a stage needs lanes, a unit and samples up to 2^40 and blocks of 1..1024");
    for (const Lane& lane : lanes_)
      if (lane.start < 0 || lane.start > unit_ || lane.end < 0 || lane.end > unit_ || lane.first_block < 0 ||
          lane.first_block >= lane.last_block || lane.last_block > kForever)
        throw std::invalid_argument("a lane's share must be in 0..unit and its blocks must not be empty");
  }

  // The share of a lane among the first t samples if it were read all the time, times denominator_.
  Wide ramp(const Lane& lane, Wide t) const {
    if (!moves_) return t * lane.start;
    const Wide twice = Wide{2} * samples_;
    const Wide inside = std::min(t, Wide{samples_});
    return twice * lane.start * inside + Wide{lane.end - lane.start} * inside * inside +
           twice * lane.end * (t - inside);
  }

  Exact exact(const Lane& lane, std::int64_t border) const {
    const std::int64_t last = std::clamp(border, lane.first_block, lane.last_block);
    const Wide share = ramp(lane, Wide{last} * block_) - ramp(lane, Wide{lane.first_block} * block_);
    return {static_cast<std::int64_t>(share / denominator_), share % denominator_};
  }

  // The first border after `border` at which the lane's exact share reaches `count`.
  std::int64_t deadline(const Lane& lane, std::int64_t border, std::int64_t count) const {
    std::int64_t step = 1;
    while (exact(lane, border + step).whole < count) {
      if (step > kFarthest) return kForever;
      step *= 2;
    }
    std::int64_t low = border + step / 2;  // not reached here, or `border` itself
    std::int64_t high = border + step;
    while (high - low > 1) {
      const std::int64_t middle = low + (high - low) / 2;
      (exact(lane, middle).whole < count ? low : high) = middle;
    }
    return high;
  }

  void lay_borders() {
    words_ = (lanes_.size() + 63) / 64;
    ahead_.assign(static_cast<std::size_t>(held_ + 1) * words_, 0);
    std::vector<std::int64_t> count(lanes_.size(), 0);
    std::vector<std::int64_t> whole(lanes_.size(), 0);
    std::vector<Candidate> candidates;
    for (std::int64_t border = 1; border <= held_; ++border) {
      candidates.clear();
      std::int64_t left = border * block_;
      for (std::size_t s = 0; s < lanes_.size(); ++s) {
        const Exact share = exact(lanes_[s], border);
        whole[s] = share.whole;
        if (share.rest != 0 && count[s] <= share.whole) candidates.push_back({0, share.rest, s});
        count[s] = std::max(count[s], share.whole);
        left -= count[s];
      }
      if (left < 0 || left > static_cast<std::int64_t>(candidates.size()))
        throw std::invalid_argument("the lanes do not add up to the unit at sample " + std::to_string(border * block_));
      if (left > 0 && left < static_cast<std::int64_t>(candidates.size())) {
        for (Candidate& c : candidates) c.deadline = deadline(lanes_[c.lane], border, count[c.lane] + 1);
        std::nth_element(candidates.begin(), candidates.begin() + (left - 1), candidates.end());
      }
      for (std::int64_t k = 0; k < left; ++k) ++count[candidates[static_cast<std::size_t>(k)].lane];
      for (std::size_t s = 0; s < lanes_.size(); ++s)
        if (count[s] > whole[s])
          ahead_[static_cast<std::size_t>(border) * words_ + s / 64] |= std::uint64_t{1} << (s % 64);
    }
  }

  std::int64_t count_at(std::size_t lane, std::int64_t border) const {
    const auto state = static_cast<std::size_t>(border % period_);
    const std::uint64_t ahead = ahead_[state * words_ + lane / 64] >> (lane % 64) & 1;
    return exact(lanes_[lane], border).whole + static_cast<std::int64_t>(ahead);
  }

  // Fills `counts` with what comes before the sample; returns the lane of the sample.
  std::size_t walk(std::int64_t sample, std::vector<std::int64_t>& counts) const {
    const std::int64_t border = sample / block_;
    const std::int64_t slot = sample % block_;
    if (border >= held_ && held_ < period_) {  // the very end of the stage: no block follows
      for (std::size_t s = 0; s < size(); ++s) counts.push_back(count_at(s, border));
      return 0;
    }
    std::vector<std::int64_t> quota(size());
    std::vector<std::int64_t> next(size(), -1);                             // of those that wait for the same slot
    std::vector<std::int64_t> waiting(static_cast<std::size_t>(block_), -1);  // first lane that waits for a slot
    std::vector<std::int64_t> taken(size(), 0);
    std::vector<std::pair<std::int64_t, std::size_t>> ready;  // (deadline, lane), earliest on top
    for (std::size_t s = size(); s-- > 0;) {
      counts.push_back(0);
      quota[s] = count_at(s, border + 1) - count_at(s, border);
      if (quota[s] > 0) {
        next[s] = waiting[0];
        waiting[0] = static_cast<std::int64_t>(s);
      }
    }
    for (std::size_t s = 0; s < size(); ++s) counts[s] = count_at(s, border);
    for (std::int64_t now = 0;; ++now) {
      for (std::int64_t s = waiting[static_cast<std::size_t>(now)]; s >= 0; s = next[static_cast<std::size_t>(s)]) {
        const auto lane = static_cast<std::size_t>(s);
        ready.emplace_back(((taken[lane] + 1) * block_ + quota[lane] - 1) / quota[lane], lane);
        std::push_heap(ready.begin(), ready.end(), std::greater<>());
      }
      std::pop_heap(ready.begin(), ready.end(), std::greater<>());
      const std::size_t lane = ready.back().second;
      ready.pop_back();
      if (now == slot) return lane;
      ++counts[lane];
      if (++taken[lane] < quota[lane]) {
        const auto release = static_cast<std::size_t>(std::max(taken[lane] * block_ / quota[lane], now + 1));
        next[lane] = waiting[release];
        waiting[release] = static_cast<std::int64_t>(lane);
      }
    }
  }

  std::vector<Lane> lanes_;
  std::int64_t unit_;
  std::int64_t samples_;
  std::int64_t block_;
  bool moves_ = false;
  Wide denominator_ = 1;
  std::int64_t period_ = 1;
  std::int64_t held_ = 0;
  std::size_t words_ = 1;
  std::vector<std::uint64_t> ahead_;  // a bit for each border and lane
};

}  // namespace cpt
